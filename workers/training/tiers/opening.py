"""Open the places that a stage keeps its updates in, after a look whether there is room for them."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from cache_store.errors import OutOfHostMemory, StorageFull, UserError
from workers.device import has_values, is_host
from workers.specs.experiment import OptimizerSpec
from workers.specs.memory import MemorySpec
from workers.specs.tier_bytes import tier_bytes
from workers.training.tiers.places import DevicePlace, DiskPlace, HostPlace, Place, aligned, allocate

_log = logging.getLogger("segprop.worker")

#: Disks that write fewer bytes a second are warned of: an NVMe disk writes 1 to 7 GB/s, a network volume 0.1 to 0.5.
SLOW_DISK = 500e6
#: Bytes that are written to measure a disk, for files of at least as much.
PROBE = 64 << 20
#: Pages that tensors may leave free at their ends, each: a state has at most three, and there is a master.
_TENSORS = 4


@dataclass(frozen=True)
class Places:
    """Where the parts of updates lie. `copies`: the weights that are updated, where they are not the device's own."""

    states: Place
    copies: Place
    sums: Place


def open_places(
    spec: OptimizerSpec, parameters: Sequence[nn.Parameter], memory: MemorySpec, device: torch.device
) -> Places:
    """Open what `memory` asks for, for the updates of these parameters of `device`.

    Before anything is allocated: OutOfHostMemory where the host has not enough, StorageFull where the disk has not,
    UserError where the folder cannot be written. A slow disk is warned of.
    """
    trainable = sum(parameter.numel() for parameter in parameters)
    weights = sum(parameter.nbytes for parameter in parameters)
    needed = tier_bytes(spec, memory, trainable, weights, on_host=is_host(device))
    by_tier: dict[str, Place] = {"device": DevicePlace(device), "host": HostPlace(device), "disk": HostPlace(device)}
    real = all(has_values(parameter) for parameter in parameters)
    if real:
        check_host(needed.host)
    if real and needed.disk and memory.disk is not None:
        by_tier["disk"] = _disk(Path(memory.disk), needed.disk + _TENSORS * aligned(1) * len(parameters))
    return Places(
        states=by_tier[memory.optimizer],
        copies=by_tier[memory.optimizer if memory.masters == "none" else memory.masters],
        sums=by_tier["host" if memory.updates_on_host else "device"],
    )


def check_host(needed: int) -> None:
    """Raise OutOfHostMemory where the host has less than this free."""
    free = available_bytes()
    if needed > free:
        raise OutOfHostMemory(
            f"memory: the updates of this stage need {_gigabytes(needed)} of host memory, {_gigabytes(free)} are free; "
            "nothing was trained. Use memory.optimizer disk, training.optimizer.name adamw8bit, or train less at once "
            "(split.base, split.segment_size)",
            needed=needed,
            free=free,
        )


def available_bytes() -> int:
    """Tell how much memory this process may still take: of the machine, or of the container it is in."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if most == "max" else max(0, min(free, int(most) - used))


def _disk(folder: Path, size: int) -> DiskPlace:
    """A file without a name in `folder`: it is gone when the process is, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            allocate(file, size)
            if size >= PROBE:
                _warn_if_slow(folder, size)
            return DiskPlace(file, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free
            raise StorageFull(
                f"memory.disk: {folder}: the updates of this stage need {_gigabytes(size)}, {_gigabytes(free)} are "
                "free; nothing was trained. Free some space, or name a folder on another disk",
                needed=size,
                free=free,
            ) from None
        raise UserError(
            f"memory.disk: {folder}: cannot be written ({error.strerror}); allowed: a folder on a local disk"
        ) from None


def _warn_if_slow(folder: Path, size: int) -> None:
    speed = written_per_s(folder)
    if speed < SLOW_DISK:
        _log.warning(
            "memory.disk: %s writes %.0f MB/s: every update reads and writes %s, about %.0f s; an NVMe disk writes "
            "more than 1,000 MB/s",
            folder,
            speed / 1e6,
            _gigabytes(size),
            2 * size / speed,
        )


def written_per_s(folder: Path) -> float:
    """Measure how many bytes a second a disk writes, by a file that is gone afterwards."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begun = time.perf_counter()
        for _ in range(PROBE // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        return PROBE / max(time.perf_counter() - begun, 1e-9)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
