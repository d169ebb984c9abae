"""Dtypes, automatic mixed precision and asynchronous copies of one device."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cache_store.formats.torch_dtypes import TORCH
from workers.specs.capability import Capability, cpu_capability
from workers.specs.experiment import COMPUTED, Precision

_log = logging.getLogger("segprop.worker")


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The host tensor where `device` can copy it from asynchronously; itself where that makes no difference.

    torch's host allocator reuses pinned memory only after the copies out of it have finished.
    """
    return tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor


def to_device(tensor: Tensor, device: torch.device, *, memory_format: torch.memory_format | None = None) -> Tensor:
    """The tensor on `device`, there by the time anything enqueued later reads it."""
    layout = torch.preserve_format if memory_format is None else memory_format
    return pinned(tensor, device).to(device, non_blocking=True, memory_format=layout)


#: What autocast computes in.
DTYPES: dict[str, torch.dtype] = {precision: TORCH[name] for precision, name in COMPUTED.items()}


def capability_of(device: torch.device) -> Capability:
    """Say what a device that is here computes in."""
    if device.type == "cuda":
        return Capability("cuda", version=torch.cuda.get_device_capability(device))
    return cpu_capability()


@cache
def name_emulated(device: torch.device, precision: Precision) -> None:
    """Log, once a process, that a device only emulates the precision it is about to train in."""
    warning = capability_of(device).warning(precision)
    if warning is not None:
        _log.warning("%s", warning)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def as_input(boundary: tuple[torch.Tensor, ...], precision: Precision) -> tuple[torch.Tensor, ...]:
    """A frozen boundary as the next part takes it: float32, unless it is in the type that autocast computes in.

    Autocast would only cast float32 back to that type, once for every convolution that reads the boundary and each
    copy kept for the backward pass: same bits, several times the memory.
    """
    computed = DTYPES[precision]
    return tuple(tensor if tensor.dtype == computed else tensor.float() for tensor in boundary)
