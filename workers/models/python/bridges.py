"""Parts of one stage only, for chains whose boundaries may have any shape; `outline` says which leads where."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workers.models.conv_adapters import initialise
from workers.models.counting import Shape
from workers.models.python.outline import TOKENS, VECTOR, bridge, features, places

Boundary = tuple[Tensor, ...]


class Same(nn.Module):
    """Between boundaries of one shape."""

    def forward(self, boundary: Boundary) -> Boundary:
        return boundary


class MapAdapter(nn.Module):
    """Map -> map: 1x1 convolution, BN and ReLU; `stride` None: on means over the cells of the target's grid."""

    def __init__(self, source: Shape, target: Shape, stride: int | None) -> None:
        super().__init__()
        self._grid = None if stride is not None else (target[1], target[2])
        self.conv = nn.Conv2d(source[0], target[0], kernel_size=1, stride=stride or 1, bias=False)
        self.bn = nn.BatchNorm2d(target[0])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, boundary: Boundary) -> Boundary:
        (x,) = boundary
        if self._grid is not None:
            x = F.adaptive_avg_pool2d(x, self._grid)
        return (cast("Tensor", self.relu(self.bn(self.conv(x)))),)


class LinearAdapter(nn.Module):
    """A linear layer over the features of every place, for every other pair of shapes."""

    def __init__(self, source: Shape, target: Shape, inputs: int, outputs: int) -> None:
        super().__init__()
        self._source, self._target = source, target
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, boundary: Boundary) -> Boundary:
        x = by_places(boundary[0])
        if len(self._target) == VECTOR:
            return (cast("Tensor", self.linear(x.mean(dim=1))),)
        if len(self._source) == VECTOR:
            return (cast("Tensor", self.linear(x[:, 0])).view(-1, *self._target),)
        count = places(self._target)
        if x.shape[1] != count:
            x = F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2)
        x = self.linear(x)
        return (x if len(self._target) == TOKENS else x.transpose(1, 2).reshape(-1, *self._target),)


class LocalHead(nn.Module):
    """LW's local head: the mean over all places, and a linear layer -> (B, classes)."""

    def __init__(self, source: Shape, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features(source), classes)

    def forward(self, boundary: Boundary) -> Tensor:
        return cast("Tensor", self.fc(by_places(boundary[0]).mean(dim=1)))


class Turned(nn.Module):
    """What works on maps with channels first, for boundaries that have them last."""

    def __init__(self, held: nn.Module, *, before: bool, after: bool) -> None:
        super().__init__()
        self.held = held
        self._before, self._after = before, after

    def forward(self, boundary: Boundary) -> Boundary | Tensor:
        if self._before:
            boundary = (boundary[0].permute(0, 3, 1, 2),)
        given = self.held(boundary)
        return (given[0].permute(0, 2, 3, 1).contiguous(),) if self._after else given


def by_places(x: Tensor) -> Tensor:
    """(B, places, features) of maps, tokens, vectors, and of whatever has its channels first."""
    if x.ndim == 1 + TOKENS:
        return x
    return x.unsqueeze(1) if x.ndim == 1 + VECTOR else x.flatten(2).transpose(1, 2)


def build_adapter(
    source: Shape, target: Shape, seed: int, device: torch.device, last: tuple[bool, bool] = (False, False)
) -> nn.Module:
    """Lead from boundary `source` to `target`; initialised from `seed` alone, the same on every device. Shapes of maps
    have their channels first; `last`: of which of the two the boundary has them last."""
    way = bridge(source, target)
    if way.layer == "none":
        return Same() if last[0] == last[1] else Turned(Same(), before=last[0], after=last[1])
    with torch.device("meta"):
        adapter: nn.Module
        if way.layer == "conv":
            adapter = MapAdapter(source, target, way.stride)
        else:
            adapter = LinearAdapter(source, target, way.inputs, way.outputs)
        if any(last):
            adapter = Turned(adapter, before=last[0], after=last[1])
    return initialise(adapter, seed).to(device)


def build_aux(source: Shape, classes: int, seed: int, device: torch.device, *, last: bool = False) -> nn.Module:
    """LW's local head on boundary `source`, initialised from `seed` alone. Shape and `last` as of `build_adapter`."""
    with torch.device("meta"):
        aux: nn.Module = LocalHead(source, classes)
        if last:
            aux = Turned(aux, before=True, after=False)
    return initialise(aux, seed).to(device)
