"""Where tensors of a stage lie that the device need not hold."""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from typing import IO

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

    def let_go(self, tensor: Tensor, part: slice) -> None:  # noqa: B027  where it is memory, it stays
        """Say that some numbers of a tensor of this place, in the order of memory, are not needed for a while."""


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


class DiskPlace(Place):
    """A file, mapped. Its pages are in memory while they are worked with; the kernel writes them out when they were let
    go, or when it wants the memory."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        """`file`: of at least `size` bytes, all zeros, that are allocated on its disk: a write to a page for which the
        disk has no room would end the process."""
        self._map = mmap.mmap(file.fileno(), size)
        self._begin = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        self._used = 0

    def empty(self, numbers: int, dtype: torch.dtype) -> Tensor:
        begin, self._used = self._used, self._used + aligned(numbers * dtype.itemsize)
        if numbers == 0:
            return torch.zeros(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=numbers, offset=begin)

    def let_go(self, tensor: Tensor, part: slice) -> None:
        begin = tensor.data_ptr() - self._begin + part.start * tensor.element_size()
        end = begin + (part.stop - part.start) * tensor.element_size()
        # What was written stays in the kernel's cache of the file until it is on disk.
        begin -= begin % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def aligned(size: int) -> int:
    """Bytes that a tensor of so many takes in a file: whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def allocate(file: IO[bytes], size: int) -> None:
    """Reserve bytes of a new file on its disk. OSError, ENOSPC, where there is no room."""
    os.posix_fallocate(file.fileno(), 0, size)
