"""Dtypes, automatic mixed precision and asynchronous copies of one device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

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


#: The kind of device that tensors without bytes stand for, while a stage is traced.
_stood_for: ContextVar[str | None] = ContextVar("stood_for", default=None)


def kind_of(device: torch.device) -> str:
    """The type of a device, as pieces of work are sized by it: `cuda` also of a CPU that stands in for one."""
    return _stood_for.get() or device.type


@contextmanager
def standing_in_for(kind: str) -> Iterator[None]:
    """Let devices count as of this type wherever pieces of work are sized (`workers.tracing`)."""
    token = _stood_for.set(kind)
    try:
        yield
    finally:
        _stood_for.reset(token)


def is_host(device: torch.device) -> bool:
    """Whether the device is the host itself, and not a CPU that stands in for another one."""
    return kind_of(device) == "cpu"


def host_beside(device: torch.device) -> torch.device:
    """The host as a place beside `device`. While a stage is traced the CPU stands in for the device, and a GPU that
    need not be there for the host, so that memory is counted apart."""
    return torch.device("cpu" if device.type != "cpu" or is_host(device) else kind_of(device))


#: Pieces of a loop that a trace takes: with the second all is there that earlier ones leave behind.
_TRACED_PIECES = 2


def pieces(count: int, size: int) -> Iterator[slice]:
    """Yield the slices of `size` numbers or rows that cover `count`, the last one shorter where it must be.

    While a stage is traced, the first few: later ones hold no more, and would take minutes of bookkeeping.
    """
    starts = range(0, count, size)
    for start in starts if _stood_for.get() is None else starts[:_TRACED_PIECES]:
        yield slice(start, min(start + size, count))


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to look at: tensors of a trace have shapes alone."""
    return not isinstance(tensor, FakeTensor)


def with_values() -> AbstractContextManager[Any]:
    """Make real tensors for a while, also inside a trace."""
    made: AbstractContextManager[Any] = unset_fake_temporarily()
    return made


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
