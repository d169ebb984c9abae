"""A ResNet's parts as the training code asks for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workers.models.base import Parts
from workers.models.counting import Shape
from workers.models.resnet import parts
from workers.models.resnet.outline import resnet_outline
from workers.specs.experiment import ResNetSpec


class ResNetParts(Parts):
    """See `workers.models.base.Parts`; `workers.models.resnet.parts` says what the modules take and give."""

    def __init__(self, model: ResNetSpec, image_size: int, classes: int) -> None:
        self._model = model
        self._chain = (model, image_size, classes)

    def names(self) -> list[str]:
        return parts.part_names(*self._chain)

    def state_names(self, part: str) -> list[str]:
        return parts.part_state_names(*self._chain, part)

    def build(self, part: str, device: torch.device) -> nn.Module:
        return parts.build_part(*self._chain, part, device)

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        return parts.build_adapter(*self._chain, source, target, seed, device)

    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        return parts.build_aux(*self._chain, source, seed, device)

    def boundary(self, blocks: int) -> Mapping[str, Shape]:
        outputs = resnet_outline(*self._chain).boundaries[blocks]
        names = ("x",) if len(outputs) == 1 else ("identity", "path")
        return dict(zip(names, outputs, strict=True))

    def identity(self) -> str:
        return self._model.name
