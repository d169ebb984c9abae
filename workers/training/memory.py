"""Measure peak memory by the published protocol: start before a steady-state epoch, read after it.

Device: `torch.cuda.max_memory_allocated` (reserved beside it). Host: the largest *private* memory of the process,
sampled, because the kernel's own high-water mark also counts mapped files: a stage reading snapshots would be
charged for page cache that the kernel may take back at any time.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

#: Seconds between samples of host memory. A sample takes the interpreter from the step loop for a moment: a hundred
#: a second cost 2.6% of a small CPU step.
SAMPLE_EVERY_S = 0.02
#: Epochs of a stage in which host memory is sampled: the first, and one steady-state epoch, which is the figure.
SAMPLED_EPOCHS = 2


@dataclass(frozen=True)
class Peak:
    """Bytes. Device figures are None without a CUDA device."""

    device: int | None
    device_reserved: int | None
    #: None where it was not sampled.
    host: int | None


def highest(peaks: Sequence[Peak]) -> Peak:
    """Take the highest of each figure: what one device, or process, of several needs."""
    device, reserved, host = (
        max((value for value in values if value is not None), default=None)
        for values in zip(*((peak.device, peak.device_reserved, peak.host) for peak in peaks), strict=True)
    )
    return Peak(device=device, device_reserved=reserved, host=host)


class PeakMeter:
    """Measure from construction to `stop()`; also a context manager, so that its thread always ends."""

    def __init__(self, device: torch.device, *, host: bool = True) -> None:
        self._device = device
        self._host = private_bytes()
        self._done = threading.Event()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._thread: threading.Thread | None = None
        if host:
            self._thread = threading.Thread(target=self._sample, name="segprop-memory", daemon=True)
            self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self._host = max(self._host, private_bytes())

    def stop(self) -> Peak:
        self._done.set()
        host = None
        if self._thread is not None:
            self._thread.join()
            host = max(self._host, private_bytes())
        allocated = reserved = None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
        return Peak(device=allocated, device_reserved=reserved, host=host)

    def __enter__(self) -> PeakMeter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()


def load_lazily_loaded() -> None:
    """What torch loads with a process's first optimizer (its compiler: 80 MB on the host), now: otherwise the first
    stage of a worker would be charged for it."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


def settled_private_bytes() -> int:
    """Read private memory after handing freed memory back, so that the stages of one pooled worker compare."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # musl has no malloc_trim
            return private_bytes()
    return private_bytes()


def private_bytes() -> int:
    """Read the resident memory of this process that no file backs. Where /proc is missing: its lifetime peak."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared, *_ = file.read().split()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
