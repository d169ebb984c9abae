"""torchvision's VGGs as arithmetic: the units of the chain, cut into segments and head. Pure Python.

A unit `stage3.1` is a convolution, BN (of the `_bn` names), ReLU, and behind the last one of a stage max-pooling.
`saved_elements` follows the rules of `workers.models.outline`.
"""

from __future__ import annotations

from cache_store.errors import ConfigError
from workers.models.counting import Cost, Shape, batch_norm, conv, elements, max_pool, mlp
from workers.models.outline import ChainOutline, Piece, join
from workers.models.segments import Segments, group, with_units
from workers.specs.experiment import VGGSpec

#: Convolutions of each stage: configurations A, B, D and E of table 1 of arXiv 1409.1556.
CONVS: dict[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
CHANNELS = (64, 128, 256, 512, 512)
#: Side of the map that torchvision's classifier reads, and the widths of its layers.
_POOLED, _WIDE = 7, [4096, 4096]
_SMALLEST = 2 ** len(CHANNELS)


def convs_of(model: VGGSpec) -> tuple[int, ...]:
    """Convolutions of each stage. ConfigError for a head that takes more of them than the last stage has.

    Users choose 1 and more. 0 is the bare head that `VGGFamily.with_bare_head` asks for.
    """
    convs = CONVS[model.name.removesuffix("_bn")]
    if not 0 <= model.head_convs <= convs[-1]:
        raise ConfigError(
            f"model.head_convs: {model.head_convs}, but the last stage of {model.name} has {convs[-1]} convolutions; "
            f"allowed: 1-{convs[-1]}",
            where="model.head_convs",
            value=model.head_convs,
            allowed=list(range(1, convs[-1] + 1)),
        )
    return convs


def normalized(model: VGGSpec) -> bool:
    """Tell whether batch normalization follows every convolution."""
    return model.name.endswith("_bn")


def vgg_outline(model: VGGSpec, image_size: int, classes: int) -> ChainOutline:
    """Return the chain of `model` for square RGB images of `image_size` pixels and `classes` classes.

    ConfigError, with what is allowed: a head that takes more convolutions than the last stage has, segments that do not
    cover the chain once and in order, images so small that nothing is left of them.
    """
    convs = convs_of(model)
    if image_size < _SMALLEST:
        raise ConfigError(
            f"data.image_size: {image_size} is too small: {model.name} halves it {len(CHANNELS)} times; the smallest "
            f"image it takes is {_SMALLEST}",
            where="data.image_size",
            value=image_size,
        )
    if classes < 1:
        raise ConfigError(f"classes: {classes}; at least 1 is needed", where="classes", value=classes)
    pieces = _features(model, convs, image_size)
    (features,) = pieces[-1].outputs
    cut = len(pieces) - model.head_convs
    tail = [*pieces[cut:], _classifier(model, features, classes)]
    by_unit = {piece.unit: piece for piece in pieces[:cut]}
    groups = group(model.segments, list(by_unit), tuple(piece.unit for piece in tail[:-1]))
    blocks = tuple(
        join(f"seg{index}", [by_unit[unit] for unit in units]) for index, units in enumerate(groups, start=1)
    )
    head = join("head", tail)
    return ChainOutline(
        blocks=blocks,
        head=head,
        boundaries=(*(block.inputs for block in blocks), head.inputs),
        head_input=head.inputs,
        classes=classes,
        aux_channels=CHANNELS[-1],
        bare_head=model.head_convs == 0,
    )


def with_head_units(model: VGGSpec) -> Segments:
    """Return the segments of a model with the head's convolutions in the last one, where lists leave them out."""
    convs = CONVS[model.name.removesuffix("_bn")][-1]
    taken = range(max(convs - model.head_convs, 0), convs)
    return with_units(model.segments, [f"stage{len(CHANNELS)}.{index}" for index in taken])


def _features(model: VGGSpec, convs: tuple[int, ...], image_size: int) -> list[Piece]:
    pieces: list[Piece] = []
    shape: Shape = (3, image_size, image_size)
    for stage, (count, channels) in enumerate(zip(convs, CHANNELS, strict=True), start=1):
        for index in range(count):
            piece = _unit(model, f"stage{stage}.{index}", shape, channels, ends=index == count - 1)
            pieces.append(piece)
            (shape,) = piece.outputs
    return pieces


def _unit(model: VGGSpec, unit: str, shape: Shape, channels: int, *, ends: bool) -> Piece:
    """One convolution and what follows it. ReLU's result is counted by whoever reads it."""
    output, cost = conv(shape, channels, kernel=3, bias=True)
    cost += Cost(saved_elements=elements(shape))
    if normalized(model):
        cost += batch_norm(output)
    if ends:
        output, added = max_pool(output, kernel=2, stride=2)
        cost += added
    return Piece(unit, (shape,), (output,), cost)


def _classifier(model: VGGSpec, features: Shape, classes: int) -> Piece:
    """Pooling and the classifier. A bare head is trained alone, so of its input nothing is kept."""
    channels = features[0]
    if model.classifier == "torchvision":
        cost = mlp([channels * _POOLED**2, *_WIDE, classes], model.dropout)
        # Unlike the mean over a map, pooling to a grid keeps its input.
        cost += Cost(saved_elements=elements(features) if model.head_convs else 0)
    else:
        hidden = [model.hidden] if model.classifier == "mlp" else []
        cost = mlp([channels, *hidden, classes], model.dropout)
    return Piece("classifier", (features,), ((classes,),), cost)
