"""Where tensors of a stage lie that the device need not hold."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from workers.device import host_beside


class Place(ABC):
    """A memory that tensors are made in once, at the beginning of a stage."""

    @abstractmethod
    def empty(self, numbers: int, dtype: torch.dtype) -> Tensor:
        """Make (numbers,) of zeros."""

    def zeros(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Make zeros of this type, in the shape and the order of memory of `like`, which is dense."""
        return self.empty(like.numel(), dtype).as_strided(like.size(), like.stride())


class DevicePlace(Place):
    """The memory of the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def empty(self, numbers: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numbers, dtype=dtype, device=self._device)


class HostPlace(Place):
    """The host's memory beside a device; pinned where that copies faster."""

    def __init__(self, device: torch.device) -> None:
        self._pin = device.type == "cuda"
        self._host = host_beside(device)

    def empty(self, numbers: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numbers, dtype=dtype, device=self._host, pin_memory=self._pin)
