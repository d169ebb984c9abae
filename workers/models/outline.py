"""What a chain looks like without building it: shapes, parameters, flops and activations of every part.

Pure Python. Planning, estimating and configuration checks work on a machine that has no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from cache_store.errors import ConfigError
from workers.models.chain_outline import ChainOutline, PartOutline
from workers.models.counting import Shape
from workers.models.resnet_outline import resnet_outline
from workers.specs import ModelSpec

__all__ = ["ChainOutline", "PartOutline", "Shape", "outline"]


def outline(model: ModelSpec, image_size: int, classes: int) -> ChainOutline:
    """The chain of `model` for square RGB images of `image_size` pixels and `classes` classes.

    ConfigError, with what is allowed and the nearest known name: unknown model, a head that takes more
    convolutions than the last block has, segments that do not cover the chain once and in order, images so
    small that nothing is left of them.
    """
    families: dict[str, Callable[[ModelSpec, int, int], ChainOutline]] = {"resnet": resnet_outline}
    if model.family not in families:
        allowed = sorted(families)
        raise ConfigError(
            f"model.family: {model.family!r} is not known; allowed: {', '.join(allowed)}",
            where="model.family",
            value=model.family,
            allowed=allowed,
        )
    return families[model.family](model, image_size, classes)
