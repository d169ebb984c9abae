"""A user's network as parts of a chain."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from cache_store.errors import UserError
from workers.models.base import Parts
from workers.models.counting import Shape
from workers.models.python.bridges import build_adapter, build_aux
from workers.models.python.building import build
from workers.models.python.cutting import Cut, cut
from workers.specs.experiment import PythonSpec


class CutParts(Parts):
    """The parts of a network that was cut; see `workers.models.base.Parts`. Names in states are the network's own."""

    def __init__(self, found: Cut, classes: int, identity: Any) -> None:
        """`identity`: JSON that names the computation."""
        self._cut, self._classes, self._identity = found, classes, identity

    def names(self) -> list[str]:
        return list(self._cut.parts)

    def state_names(self, part: str) -> list[str]:
        return list(self._part(part).state_dict())

    def build(self, part: str, device: torch.device) -> nn.Module:
        if isinstance(torch.empty(0), FakeTensor):
            raise UserError("a network that is cut by itself cannot be traced: its tensors have bytes; no --trace")
        return copy.deepcopy(self._part(part)).to(device)

    def boundary(self, blocks: int) -> Mapping[str, Shape]:
        return {"x": self._cut.outline.boundaries[blocks][0]}

    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        outline = self._cut.outline
        last = outline.has_channels_last(source)
        return build_aux(outline.channels_first(source), self._classes, seed, device, last=last)

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        outline = self._cut.outline
        last = outline.has_channels_last(source), outline.has_channels_last(target)
        return build_adapter(outline.channels_first(source), outline.channels_first(target), seed, device, last)

    def identity(self) -> Any:
        return self._identity

    def _part(self, name: str) -> nn.Module:
        if name not in self._cut.parts:
            raise ValueError(f"no part {name!r} in this network, which has {', '.join(self._cut.parts)}")
        return self._cut.parts[name]


class PythonParts(CutParts):
    """A user's network."""

    def __init__(self, model: PythonSpec, sample: Shape, classes: int) -> None:
        # The source itself is part of every identity beside this one.
        super().__init__(cut(model, sample, classes), classes, ["python", model.build, model.args, model.code])


def initial_state(model: PythonSpec, seed: int) -> dict[str, Tensor]:
    """Return the state dict that training starts from: what the function builds under this seed."""
    return dict(build(model, seed).state_dict())
