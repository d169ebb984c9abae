"""torchvision's Vision Transformers as arithmetic: `embed`, layers, head. Pure Python.

`saved_elements` follows the rules of `workers.models.outline`. A layer (torchvision's EncoderBlock) keeps its input and
both normalisations' results, queries, keys and values, the result of attention, what the second normalisation reads,
and the feed-forward network's inner values before and after GELU. Attention runs in a kernel that keeps no scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache_store.errors import ConfigError
from workers.models.counting import Cost, Shape, elements
from workers.models.outline import AlikeChainOutline, Piece, join
from workers.specs.experiment import ViTSpec


@dataclass(frozen=True, kw_only=True)
class ViTSizes:
    """Sizes of one network; see `ViTSpec`."""

    patch: int
    layers: int
    hidden: int
    heads: int
    mlp: int


#: Table 1 of "An image is worth 16x16 words" (arXiv 2010.11929), as torchvision has them.
VITS: dict[str, ViTSizes] = {
    "vit_b_16": ViTSizes(patch=16, layers=12, hidden=768, heads=12, mlp=3072),
    "vit_b_32": ViTSizes(patch=32, layers=12, hidden=768, heads=12, mlp=3072),
    "vit_l_16": ViTSizes(patch=16, layers=24, hidden=1024, heads=16, mlp=4096),
    "vit_l_32": ViTSizes(patch=32, layers=24, hidden=1024, heads=16, mlp=4096),
    "vit_h_14": ViTSizes(patch=14, layers=32, hidden=1280, heads=16, mlp=5120),
}


def sizes_of(model: ViTSpec) -> ViTSizes:
    """Return the sizes of a model. ConfigError where heads do not share the width evenly."""
    named = VITS[model.name]
    sizes = ViTSizes(
        patch=model.patch or named.patch,
        layers=model.layers or named.layers,
        hidden=model.hidden or named.hidden,
        heads=model.heads or named.heads,
        mlp=model.mlp or named.mlp,
    )
    if sizes.hidden % sizes.heads:
        raise ConfigError(
            f"model.heads: {sizes.heads} heads cannot share a width of {sizes.hidden} evenly; allowed: a divisor of "
            "model.hidden",
            where="model.heads",
            value=sizes.heads,
        )
    return sizes


def vit_outline(model: ViTSpec, image_size: int, classes: int) -> AlikeChainOutline:
    """Return the chain of `model` for square RGB images of `image_size` pixels. ConfigError where patches do not cover
    the image, or heads do not share the width."""
    sizes = sizes_of(model)
    if image_size % sizes.patch:
        raise ConfigError(
            f"data.image_size: {image_size} is no multiple of the patch, which has {sizes.patch} pixels (model.patch)",
            where="data.image_size",
            value=image_size,
        )
    if classes < 1:
        raise ConfigError(f"classes: {classes}; at least 1 is needed", where="classes", value=classes)
    image: Shape = (3, image_size, image_size)
    # The class token stands before the patches.
    tokens: Shape = ((image_size // sizes.patch) ** 2 + 1, sizes.hidden)
    layer = _layer(sizes, tokens, kept_masks=model.dropout > 0)
    blocks = (
        join("embed", [Piece("embed", (image,), (tokens,), _embed(sizes, image, tokens, model.dropout > 0))]),
        *(
            join(f"layer{index}", [Piece(f"layer{index}", (tokens,), (tokens,), layer)])
            for index in range(sizes.layers)
        ),
    )
    head = join("head", [Piece("head", (tokens,), ((classes,),), _head(sizes, tokens, classes))])
    return AlikeChainOutline(
        blocks=blocks,
        head=head,
        boundaries=(*(block.inputs for block in blocks), head.inputs),
        head_input=head.inputs,
        classes=classes,
        aux_channels=sizes.hidden,
    )


def _embed(sizes: ViTSizes, image: Shape, tokens: Shape, kept_masks: bool) -> Cost:
    weights = sizes.hidden * image[0] * sizes.patch**2
    return Cost(
        # Class token and a position a token beside the convolution.
        parameters=weights + sizes.hidden + sizes.hidden + elements(tokens),
        flops=2 * weights * (tokens[0] - 1),
        saved_elements=elements(image) + (elements(tokens) if kept_masks else 0),
    )


def _layer(sizes: ViTSizes, tokens: Shape, *, kept_masks: bool) -> Cost:
    count, width = tokens
    inner = count * sizes.mlp
    matrices = 4 * width * width + 2 * width * sizes.mlp
    # Dropout keeps a mask and gives what follows a tensor of its own; after GELU the masked values are the input.
    masks = 2 * elements(tokens) + 2 * inner if kept_masks else 0
    return Cost(
        parameters=matrices + 4 * width + sizes.mlp + width + 4 * width,
        flops=2 * matrices * count + 4 * width * count * count,
        saved_elements=8 * elements(tokens) + 2 * inner + masks,
    )


def _head(sizes: ViTSizes, tokens: Shape, classes: int) -> Cost:
    """The last normalisation, of all tokens, and the classifier on the class token. It reads one row of the
    normalisation's result, and so keeps the whole."""
    linear = Cost.linear(sizes.hidden, classes)
    return Cost(
        parameters=linear.parameters + 2 * sizes.hidden, flops=linear.flops, saved_elements=2 * elements(tokens)
    )
