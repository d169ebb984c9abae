"""Parts of one stage only, for chains of convolutions: adapters and local heads, as published.

A strided 1x1 convolution, BN and ReLU take a boundary to the grid of the target. A boundary is a tuple of float
tensors (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from workers.models.outline import ChainOutline

Boundary = tuple[Tensor, ...]


class _Scale(nn.Module):
    """A strided 1x1 convolution over the concatenated boundary, BN and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def scale(self, boundary: Boundary) -> Tensor:
        x = boundary[0] if len(boundary) == 1 else torch.cat(boundary, dim=1)
        return cast("Tensor", self.relu(self.bn(self.conv(x))))


class Adapter(_Scale):
    """Boundary -> boundary on the target's grid, the channels split into the target's tensors."""

    def __init__(self, inputs: int, outputs: tuple[int, ...], stride: int) -> None:
        super().__init__(inputs, sum(outputs), stride)
        self._outputs = outputs

    def forward(self, boundary: Boundary) -> Boundary:
        out = self.scale(boundary)
        return (out,) if len(self._outputs) == 1 else torch.split(out, list(self._outputs), dim=1)


class LocalClassifier(nn.Module):
    """LW's local head on a boundary that is what the head reads, (x,) -> logits (B, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, classes)

    def forward(self, boundary: Boundary) -> Tensor:
        (x,) = boundary
        return cast("Tensor", self.fc(torch.flatten(self.avgpool(x), 1)))


class Aux(_Scale):
    """LW's local head with a mapping: boundary -> logits (B, classes)."""

    def __init__(self, inputs: int, channels: int, stride: int, classes: int) -> None:
        super().__init__(inputs, channels, stride)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, classes)

    def forward(self, boundary: Boundary) -> Tensor:
        return cast("Tensor", self.fc(torch.flatten(self.avgpool(self.scale(boundary)), 1)))


def build_adapter(chain: ChainOutline, source: int, target: int, seed: int, device: str | torch.device) -> nn.Module:
    """Map from boundary `source` to the input of block `target`, or to what the head reads for target n.

    He-initialised from `seed` alone, the same on every device. ConfigError when no stride reaches the grid.
    """
    outputs = tuple(shape[0] for shape in chain.adapter_target(target))
    stride = chain.adapter_stride(source, target)
    with torch.device("meta"):
        adapter = Adapter(_channels(chain, source), outputs, stride)
    return initialise(adapter, seed).to(device)


def build_aux(chain: ChainOutline, source: int, seed: int, device: str | torch.device) -> nn.Module:
    """LW's local head: boundary `source` -> logits (B, classes), initialised from `seed` alone."""
    with torch.device("meta"):
        aux = _local_head(chain, source)
    return initialise(aux, seed).to(device)


def _local_head(chain: ChainOutline, source: int) -> nn.Module:
    if not chain.aux_maps(source):
        return LocalClassifier(chain.aux_channels, chain.classes)
    stride = chain.adapter_stride(source, len(chain.blocks))
    return Aux(_channels(chain, source), chain.aux_channels, stride, chain.classes)


def _channels(chain: ChainOutline, source: int) -> int:
    return sum(shape[0] for shape in chain.boundaries[source])


def initialise(module: nn.Module, seed: int) -> nn.Module:
    """Allocate on the CPU and initialise from a generator of its own: the global one is not touched.

    Weights after He, biases zero, as published for adapters and local heads.
    """
    module = module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for layer in _leaves(module):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
        elif isinstance(layer, nn.Linear):
            # Over the inputs: over the few classes, logits would be many times too large.
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return module


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if next(layer.children(), None) is None)
