"""What parts made of a torchvision network's own modules have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from workers.models.base import Parts
from workers.models.counting import Shape
from workers.models.outline import ChainOutline


class TorchvisionParts(Parts):
    """Parts put together on the meta device and then copied: building one never allocates another. A boundary is one
    tensor."""

    def __init__(self, chain: ChainOutline) -> None:
        self._chain = chain

    @abstractmethod
    def _assemble(self, name: str) -> nn.Module:
        """The part on the meta device, made of a shared network's own modules: copy it before use."""

    def names(self) -> list[str]:
        return [*(block.name for block in self._chain.blocks), self._chain.head.name]

    def state_names(self, part: str) -> list[str]:
        return list(self._assemble(part).state_dict())

    def build(self, part: str, device: torch.device) -> nn.Module:
        return copy.deepcopy(self._assemble(part)).to_empty(device=device)

    def boundary(self, blocks: int) -> Mapping[str, Shape]:
        (shape,) = self._chain.boundaries[blocks]
        return {"x": shape}
