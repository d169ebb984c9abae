"""What a worker process has: storage, device, threads and a line to whoever runs it."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from cache_store.records.nodes import NodeStore
from cache_store.snapshots.shard_cache import ShardCache
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import Storage
from workers.control import Control
from workers.distributed.gang import ALONE, Gang
from workers.specs.orders import CHECKPOINT_MEMORY, INTERRUPTIONS_EVERY_S
from workers.specs.results import Where


@dataclass
class WorkerEnvironment:
    storage: Storage
    device: torch.device
    threads: int
    control: Control
    started: float = field(default_factory=time.time)
    gang: Gang = ALONE
    #: Most bytes of snapshot shards this task holds at a time; None: what `cache_store.snapshots.shard_cache` says.
    snapshot_memory: int | None = None
    #: Seconds between two interruptions of this slot, on average.
    interruptions_every_s: float = INTERRUPTIONS_EVERY_S
    #: Most bytes of tensors that are copied for an update that comes before they are written to a checkpoint.
    checkpoint_memory: int = CHECKPOINT_MEMORY

    def __post_init__(self) -> None:
        self.kept = ShardCache(self.snapshot_memory)
        self.nodes = NodeStore(self.storage)
        self.snapshots = SnapshotStore(self.storage)

    def where(self) -> Where:
        """Say where and when the task ran, up to now."""
        return Where(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self.device),
            threads=self.threads,
            world_size=self.gang.size,
            started=self.started,
            finished=time.time(),
        )


def prepare_process(device: torch.device, threads: int, *, deterministic: bool) -> None:
    """Set the calling thread up for one task. Bits depend on the thread count, so it is set every time."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        # cuBLAS reads this when its first handle is made; without it deterministic mode refuses matmuls.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # No operation here reads memory it has not written; filling every fresh tensor costs a pass over it.
    cast("Any", torch.utils.deterministic).fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic
