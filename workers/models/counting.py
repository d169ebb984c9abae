"""Arithmetic of layers for one sample: output shapes, parameters, buffers, flops, kept activations. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from cache_store.errors import ConfigError

#: One sample, no batch dimension: (C, H, W) or (features,).
Shape = tuple[int, ...]


def elements(shape: Shape) -> int:
    return math.prod(shape)


@dataclass(frozen=True)
class Cost:
    """Sums over layers; see `workers.models.outline` for what each figure means."""

    parameters: int = 0
    buffer_elements: int = 0
    flops: int = 0
    saved_elements: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.buffer_elements + other.buffer_elements,
            self.flops + other.flops,
            self.saved_elements + other.saved_elements,
        )

    @classmethod
    def linear(cls, inputs: int, outputs: int) -> Cost:
        """A linear layer with bias; keeps its input."""
        return cls(parameters=inputs * outputs + outputs, flops=2 * inputs * outputs, saved_elements=inputs)


class Layer(NamedTuple):
    output: Shape
    cost: Cost


def window(shape: Shape, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Output grid of a convolution or pooling; ConfigError when nothing is left of the image."""
    height, width = ((size + 2 * padding - kernel) // stride + 1 for size in shape[1:])
    if min(height, width) < 1:
        raise ConfigError(f"a {kernel}x{kernel} window with stride {stride} leaves nothing of {shape}")
    return height, width


def conv(shape: Shape, channels: int, kernel: int, stride: int = 1, groups: int = 1, *, bias: bool = False) -> Layer:
    """A convolution with same padding. Of its activations none is counted: its input may be shared."""
    grid = window(shape, kernel, stride, kernel // 2)
    weights = channels * (shape[0] // groups) * kernel * kernel
    cost = Cost(parameters=weights + (channels if bias else 0), flops=2 * weights * grid[0] * grid[1])
    return Layer((channels, *grid), cost)


def batch_norm(shape: Shape) -> Cost:
    """A BatchNorm of maps; keeps its input."""
    return Cost(parameters=2 * shape[0], buffer_elements=2 * shape[0] + 1, saved_elements=elements(shape))


def conv_bn(shape: Shape, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> Layer:
    """A convolution (no bias, same padding) and its BatchNorm.

    Of its activations only BatchNorm's input is counted: the convolution's input may be shared.
    """
    output, cost = conv(shape, channels, kernel, stride, groups)
    return Layer(output, cost + batch_norm(output))


def max_pool(shape: Shape, kernel: int, stride: int, padding: int = 0) -> Layer:
    """Max-pooling; keeps its input and the indices of its output."""
    output = (shape[0], *window(shape, kernel, stride, padding))
    return Layer(output, Cost(saved_elements=elements(shape) + elements(output)))


def mlp(widths: Sequence[int], dropout: float) -> Cost:
    """Linear layers from each width to the next, between them ReLU (in place) and dropout.

    ReLU keeps its result, which is the next layer's input. Dropout keeps a mask and gives that layer an input of its
    own.
    """
    cost = Cost()
    for inputs, outputs in pairwise(widths):
        cost += Cost.linear(inputs, outputs)
    return cost + Cost(saved_elements=2 * sum(widths[1:-1]) if dropout > 0 else 0)


def scaled_conv_bn(inputs: tuple[Shape, ...], channels: int, stride: int) -> Layer:
    """A 1x1 convolution over the concatenated channels of `inputs`, and BatchNorm; both inputs are kept."""
    shape = (sum(one[0] for one in inputs), *inputs[0][1:])
    layer = conv_bn(shape, channels, kernel=1, stride=stride)
    return Layer(layer.output, layer.cost + Cost(saved_elements=elements(shape)))


def stride_between(source: tuple[Shape, ...], target: tuple[Shape, ...]) -> int:
    """The smallest stride with which a 1x1 convolution maps `source`'s grid onto `target`'s exactly.

    ConfigError when there is none: the target's grid is finer, or lies between two strides.
    """
    here, there = source[0][1:], target[0][1:]
    for stride in range(1, max(here) + 1):
        if tuple(math.ceil(size / stride) for size in here) == there:
            return stride
    raise ConfigError(
        f"no stride takes a 1x1 convolution from a grid of {_grid(here)} to {_grid(there)}; "
        "choose another data.image_size or model.segments"
    )


def _grid(sizes: Shape) -> str:
    return "x".join(map(str, sizes))
