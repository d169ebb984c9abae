"""Peak memory by the published protocol: reset before a steady-state epoch, read after it.

Device: `torch.cuda.max_memory_allocated` (reserved beside it). Host: the kernel's resident-set high-water mark,
which Linux lets a process reset; where it does not, the process's lifetime peak is all there is.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Peak:
    """Bytes. Device figures are None without a CUDA device."""

    device: int | None
    device_reserved: int | None
    host: int


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not permitted: `read_peak` then gives the lifetime peak


def read_peak(device: torch.device) -> Peak:
    allocated = reserved = None
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
    return Peak(device=allocated, device_reserved=reserved, host=_status_kb("VmHWM") * 1024)


def resident_bytes() -> int:
    """Resident set of this process now, after handing freed memory back, so that stages of a pooled worker compare."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return _status_kb("VmRSS") * 1024  # musl has no malloc_trim
    return _status_kb("VmRSS") * 1024


def _status_kb(name: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak
