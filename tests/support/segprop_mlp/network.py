"""The modules of `segprop_mlp.family`, apart, since they load torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from workers.models.base import Parts
from workers.models.counting import Shape, elements

Boundary = tuple[Tensor, ...]


class Block(nn.Module):
    """Boundary -> boundary; the first flattens the images."""

    def __init__(self, name: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, nn.Linear(inputs, outputs))

    def forward(self, boundary: Boundary) -> Boundary:
        return (torch.relu(self.get_submodule(self._name)(boundary[0].flatten(1))),)


class Head(nn.Module):
    """Boundary -> logits (B, classes)."""

    def __init__(self, name: str, inputs: int, classes: int) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, nn.Linear(inputs, classes))

    def forward(self, boundary: Boundary) -> Tensor:
        logits: Tensor = self.get_submodule(self._name)(boundary[0].flatten(1))
        return logits


class MLPParts(Parts):
    def __init__(self, widths: tuple[int, ...], sample: Shape, classes: int) -> None:
        self._shapes: list[Shape] = [sample, *((width,) for width in widths)]
        self._classes = classes

    def names(self) -> list[str]:
        return [*(f"block{n}" for n in range(1, len(self._shapes))), "head"]

    def state_names(self, part: str) -> list[str]:
        return [f"{part}.weight", f"{part}.bias"]

    def build(self, part: str, device: torch.device) -> nn.Module:
        index = self.names().index(part)
        inputs = elements(self._shapes[index])
        if part == "head":
            return Head(part, inputs, self._classes).to(device)
        return Block(part, inputs, elements(self._shapes[index + 1])).to(device)

    def boundary(self, blocks: int) -> Mapping[str, Shape]:
        return {"x": self._shapes[blocks]}

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        return seeded(seed, Block, "adapter", elements(self._shapes[source]), elements(self._shapes[target])).to(device)

    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        return seeded(seed, Head, "aux", elements(self._shapes[source]), self._classes).to(device)

    def identity(self) -> Any:
        return ["mlp", [list(shape) for shape in self._shapes]]


def seeded(seed: int, build: Any, *arguments: Any) -> nn.Module:
    """A module initialised from `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        module: nn.Module = build(*arguments)
    return module


def initial_state(widths: tuple[int, ...], sample: Shape, classes: int, seed: int) -> dict[str, Tensor]:
    """The state of the whole network, random under `seed`."""
    parts = MLPParts(widths, sample, classes)
    state: dict[str, Tensor] = {}
    for index, name in enumerate(parts.names()):
        state |= seeded(seed + index, parts.build, name, torch.device("cpu")).state_dict()
    return state
