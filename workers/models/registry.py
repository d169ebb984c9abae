"""Models as chains of parts. Importing this module loads no torch; building parts does.

`outline` describes a chain without building it. The other functions build parts, dispatching on
`model.family`; what they take and return is documented in the family's module (`workers.models.resnet.parts`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, cast

from cache_store.errors import ConfigError
from workers.models.counting import Shape
from workers.models.outline import ChainOutline, PartOutline
from workers.models.resnet.outline import resnet_outline
from workers.specs.experiment import ResNetSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def _family(model: ResNetSpec) -> ModuleType:
    if model.family == "resnet":
        from workers.models.resnet import parts

        return parts
    raise ConfigError(f"model.family: {model.family!r} is not known; allowed: resnet", where="model.family")


def build_torchvision(model: ResNetSpec, classes: int) -> nn.Module:
    """The whole network as its library builds it, with this model's stem and classifier."""
    return cast("nn.Module", _family(model).build_torchvision(model, classes))


def initial_state(model: ResNetSpec, classes: int, seed: int) -> dict[str, Tensor]:
    """The state training starts from, by the library's own names: random under `seed`, or `model.weights`."""
    return cast("dict[str, Tensor]", _family(model).initial_state(model, classes, seed))


def build_part(
    model: ResNetSpec, image_size: int, classes: int, name: str, device: str | torch.device = "cpu"
) -> nn.Module:
    """A block (boundary -> boundary) or the head (boundary -> logits), allocated but not initialised."""
    return cast("nn.Module", _family(model).build_part(model, image_size, classes, name, device))


def build_adapter(
    model: ResNetSpec,
    image_size: int,
    classes: int,
    source: int,
    target: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Training-only map from boundary `source` to the input of block `target` (n: the head), initialised."""
    family = _family(model)
    return cast("nn.Module", family.build_adapter(model, image_size, classes, source, target, seed, device))


def build_aux(
    model: ResNetSpec,
    image_size: int,
    classes: int,
    source: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """LW's local head: boundary `source` -> logits, initialised."""
    return cast("nn.Module", _family(model).build_aux(model, image_size, classes, source, seed, device))


def part_names(model: ResNetSpec, image_size: int, classes: int) -> list[str]:
    """Blocks in forward order, then `head`."""
    return cast("list[str]", _family(model).part_names(model, image_size, classes))


def part_state_names(model: ResNetSpec, image_size: int, classes: int, name: str) -> list[str]:
    """The names in a part's state dict, without allocating it."""
    return cast("list[str]", _family(model).part_state_names(model, image_size, classes, name))


__all__ = ["ChainOutline", "PartOutline", "Shape", "outline"]


def outline(model: ResNetSpec, image_size: int, classes: int) -> ChainOutline:
    """The chain of `model` for square RGB images of `image_size` pixels and `classes` classes.

    ConfigError, with what is allowed and the nearest known name: unknown model, a head that takes more
    convolutions than the last block has, segments that do not cover the chain once and in order, images so
    small that nothing is left of them.
    """
    families: dict[str, Callable[[ResNetSpec, int, int], ChainOutline]] = {"resnet": resnet_outline}
    if model.family not in families:
        allowed = sorted(families)
        raise ConfigError(
            f"model.family: {model.family!r} is not known; allowed: {', '.join(allowed)}",
            where="model.family",
            value=model.family,
            allowed=allowed,
        )
    return families[model.family](model, image_size, classes)
