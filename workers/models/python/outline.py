"""Chains whose boundaries may have any shape, and what leads from one to another. Pure Python.

A sample of shape (C, H, W) is a map, (T, D) are tokens, (D,) is a vector. Between shapes that are equal nothing is
needed. Between maps a 1x1 convolution, BN and ReLU as published, with the stride that reaches the grid, or on the mean
over its cells where no stride does (maps with channels last, (H, W, C), are turned before and after); to tokens and
vectors a linear layer, over the last axis of tokens (their number is met by means over neighbours); from maps to
vectors after the mean over the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cache_store.errors import ConfigError
from workers.models.counting import Cost, Shape, elements, scaled_conv_bn, stride_between
from workers.models.outline import ChainOutline, PartOutline, Piece, join

MAP, TOKENS, VECTOR = 3, 2, 1
_WORDS = {MAP: "a map (C, H, W)", TOKENS: "tokens (T, D)", VECTOR: "a vector (D,)"}


@dataclass(frozen=True)
class Bridge:
    """How an adapter leads from one shape to another. `layer`: none; conv: with `stride` (None: after means over
    cells); linear: from `inputs` to `outputs` features."""

    layer: Literal["none", "conv", "linear"]
    stride: int | None = None
    inputs: int = 0
    outputs: int = 0


def bridge(source: Shape, target: Shape) -> Bridge:
    """Decide how to lead from `source` to `target`. ConfigError where one is neither map, tokens nor vector."""
    if source == target:
        return Bridge("none")
    for shape in (source, target):
        if len(shape) not in _WORDS:
            raise ConfigError(
                f"model.build: no adapter leads from {source} to {target}; allowed: {', '.join(_WORDS.values())}, or "
                "split.intermediate: frozen, which needs none",
                where="model.build",
            )
    if len(source) == len(target) == MAP:
        try:
            return Bridge("conv", stride_between((source,), (target,)))
        except ConfigError:
            return Bridge("conv")
    return Bridge(
        "linear", inputs=features(source), outputs=elements(target) if len(source) == VECTOR else features(target)
    )


def features(shape: Shape) -> int:
    """Features of a place: channels of a map, the width of tokens or of a vector."""
    return shape[0] if len(shape) != TOKENS else shape[1]


def places(shape: Shape) -> int:
    """Places that have such features."""
    return elements(shape) // features(shape)


@dataclass(frozen=True)
class PythonOutline(ChainOutline):
    """See the module. `last`: of every boundary, whether it is a map with its channels last; empty: none is."""

    last: tuple[bool, ...] = ()

    def channels_first(self, boundary: int) -> Shape:
        """The shape of a boundary, of a map with its channels first."""
        (shape,) = self.boundaries[boundary]
        return (shape[-1], *shape[:-1]) if self.has_channels_last(boundary) else shape

    def has_channels_last(self, boundary: int) -> bool:
        """Tell whether a boundary is a map with its channels last."""
        return bool(self.last) and self.last[boundary]

    def adapter(self, source: int, target: int) -> PartOutline:
        self._check_boundary("source", source)
        self._check_boundary("target", target)
        inputs, outputs = self.channels_first(source), self.channels_first(target)
        way = bridge(inputs, outputs)
        cost = Cost()
        if way.layer == "conv":
            grid = inputs if way.stride is not None else (inputs[0], *outputs[1:])
            cost = scaled_conv_bn((grid,), outputs[0], way.stride or 1).cost
        elif way.layer == "linear":
            each = 1 if VECTOR in (len(inputs), len(outputs)) else places(outputs)
            one = Cost.linear(way.inputs, way.outputs)
            cost = Cost(one.parameters, 0, one.flops * each, one.saved_elements * each)
        return join("adapter", [Piece("adapter", self.boundaries[source], self.boundaries[target], cost)])

    def aux(self, source: int) -> PartOutline:
        """LW's local head: the mean over all places, and a linear layer."""
        inputs = self.channels_first(source)
        cost = Cost.linear(features(inputs), self.classes)
        # The mean keeps nothing, but what the block ends with may keep its result.
        cost += Cost(saved_elements=elements(inputs))
        return join("aux", [Piece("aux", self.boundaries[source], ((self.classes,),), cost)])
