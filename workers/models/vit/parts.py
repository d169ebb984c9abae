"""torchvision's Vision Transformers as parts of a chain, built from torchvision's own modules.

A part's state names are torchvision's (`encoder.layers.encoder_layer_0.ln_1.weight`), so the parts' state dicts
together are a torchvision state dict. A boundary is a tuple of one float tensor: images (B, 3, S, S), then tokens
(B, T, D).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from workers.models.given_weights import merge, other_shapes, read_state, weights_error
from workers.models.torchvision_parts import TorchvisionParts
from workers.models.vit.outline import sizes_of, vit_outline
from workers.specs.experiment import ViTSpec

Boundary = tuple[Tensor, ...]

_POSITIONS = "encoder.pos_embedding"


def build_torchvision(model: ViTSpec, image_size: int, classes: int) -> VisionTransformer:
    """Build torchvision's network, initialised from the global generator: (B, 3, S, S) -> logits (B, classes)."""
    sizes = sizes_of(model)
    return VisionTransformer(
        image_size=image_size,
        patch_size=sizes.patch,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        hidden_dim=sizes.hidden,
        mlp_dim=sizes.mlp,
        dropout=model.dropout,
        num_classes=classes,
    )


def initial_state(model: ViTSpec, image_size: int, classes: int, seed: int) -> dict[str, Tensor]:
    """Return the state dict training starts from, on the CPU; the global generators are left as they were.

    Random: what torchvision initialises after `torch.manual_seed(seed)`. With `model.weights`: that file's tensors, its
    positions interpolated to this image size; a classifier of another shape stays random. ConfigError names whatever
    else differs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        state = dict(build_torchvision(model, image_size, classes).state_dict())
    if model.weights is None:
        return state
    given = _with_positions(model, image_size, read_state(model.weights))
    random = ["heads."] if other_shapes(state, given, "heads.") else []
    return merge(state, given, model.weights, random)


def _with_positions(model: ViTSpec, image_size: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Interpolate the positions of weights for images of another size, as torchvision does."""
    if _POSITIONS not in given:
        return given
    try:
        return dict(interpolate_embeddings(image_size, sizes_of(model).patch, cast("Any", dict(given))))
    except ValueError as error:
        raise weights_error(f"{model.weights}: {_POSITIONS}: {error}", str(model.weights)) from error


def _nest(module: nn.Module, name: str, child: nn.Module) -> None:
    """Register `child` under a dotted name."""
    *folders, last = name.split(".")
    for folder in folders:
        if folder not in module._modules:
            module.add_module(folder, nn.Module())
        module = module.get_submodule(folder)
    module.add_module(last, child)


class Embed(nn.Module):
    """Patches, class token and positions: images (B, 3, S, S) -> tokens (B, T, D)."""

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.class_token = network.class_token
        self.conv_proj = network.conv_proj
        self.encoder = nn.Module()
        self.encoder.register_parameter("pos_embedding", network.encoder.pos_embedding)
        self.encoder.add_module("dropout", network.encoder.dropout)

    def forward(self, boundary: Boundary) -> Boundary:
        (images,) = boundary
        patches = self.conv_proj(images).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + cast("Tensor", self.encoder.pos_embedding)
        return (cast("Tensor", self.encoder.get_submodule("dropout")(tokens)),)


class Layer(nn.Module):
    """One encoder layer: tokens (B, T, D) -> tokens."""

    def __init__(self, network: VisionTransformer, index: int) -> None:
        super().__init__()
        self._name = f"encoder.layers.encoder_layer_{index}"
        _nest(self, self._name, network.get_submodule(self._name))

    def forward(self, boundary: Boundary) -> Boundary:
        (tokens,) = boundary
        return (self.get_submodule(self._name)(tokens),)


class Head(nn.Module):
    """The last normalisation and the classifier on the class token: tokens (B, T, D) -> logits (B, classes)."""

    def __init__(self, norm: nn.Module, heads: nn.Module) -> None:
        super().__init__()
        _nest(self, "encoder.ln", norm)
        self.heads = heads

    def forward(self, boundary: Boundary) -> Tensor:
        (tokens,) = boundary
        return cast("Tensor", self.heads(self.get_submodule("encoder.ln")(tokens)[:, 0]))


@lru_cache(maxsize=16)
def _skeleton(model: ViTSpec, image_size: int, classes: int) -> VisionTransformer:
    """The whole network on the meta device, made once. Parts are put together from its modules and then copied."""
    with torch.device("meta"):
        return build_torchvision(model, image_size, classes)


class ViTParts(TorchvisionParts):
    """See `workers.models.base.Parts`."""

    def __init__(self, model: ViTSpec, image_size: int, classes: int) -> None:
        super().__init__(vit_outline(model, image_size, classes))
        self._model, self._size, self._classes = model, image_size, classes

    def _assemble(self, name: str) -> nn.Module:
        network = _skeleton(self._model, self._size, self._classes)
        part = self._chain.part(name)
        if name == "head":
            return Head(network.encoder.ln, network.heads)
        return Embed(network) if name == "embed" else Layer(network, self._chain.blocks.index(part) - 1)

    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        """Weights after He, over the inputs, and biases zero, as published for local heads; the global generator is not
        touched."""
        aux = self.build("head", torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        for module in aux.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(module.bias)
        return aux.to(device)

    def identity(self) -> Any:
        # The number of heads and the patch change what is computed, but no shape of a layer's state.
        sizes = sizes_of(self._model)
        return ["vit", sizes.patch, sizes.heads]
