"""From host to device without waiting: CUDA copies asynchronously only out of pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The host tensor where `device` can copy it from asynchronously; itself where that makes no difference.

    torch's host allocator reuses pinned memory only after the copies out of it have finished.
    """
    return tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor


def to_device(tensor: Tensor, device: torch.device, *, memory_format: torch.memory_format | None = None) -> Tensor:
    """The tensor on `device`, there by the time anything enqueued later reads it."""
    layout = torch.preserve_format if memory_format is None else memory_format
    return pinned(tensor, device).to(device, non_blocking=True, memory_format=layout)
