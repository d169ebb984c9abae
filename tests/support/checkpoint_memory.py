"""Run as a program: trains a stage without checkpoints, then again with one begun after every step, in a process that
may take no more memory than the first took and so many bytes.

    python checkpoint_memory.py FOLDER BYTES

Both are forks of this process, which itself trains nothing. Prints JSON: the bytes that the state and the peak without
checkpoints take, and how many checkpoints there were. A stage that takes too much ends it with its error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from running import Lab

from cache_store import crashpoints
from workers.training import checkpoint, clocks
from workers.training.checkpoints.writer import CheckpointWriter

STAGE = "e2e/e2e"
CHANGES = {"regimes": ["e2e"], "training.epochs": 3, "data.train_limit": 64, "training.checkpoint_every_s": 1e9}


class Strict(CheckpointWriter):
    """Lets the stage fail of what a checkpoint had no memory for, instead of making it once more."""

    def wait(self) -> None:
        super().wait()
        if isinstance(self._failure, MemoryError | RuntimeError):
            raise self._failure


def data_bytes() -> int:
    """Private memory of this process that can be written: what RLIMIT_DATA counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmData")


def train(folder: Path, limit: int | None) -> dict[str, int]:
    """Train the stage: the highest `data_bytes` seen, and how many checkpoints were committed."""
    torch.set_num_threads(1)
    threading.stack_size(1 << 20)
    clocks.REPORT_EVERY_S = 0.0
    checkpoint.CheckpointWriter = Strict
    seen = {"peak": 0, "checkpoints": 0}

    def reach(name: str) -> None:
        seen["peak"] = max(seen["peak"], data_bytes())
        seen["checkpoints"] += name == "checkpoint.committed"

    crashpoints._armed, crashpoints._reach_armed = True, reach
    often = {"training.checkpoint_every_s": 1e-6} if limit else {}
    lab = Lab.make(folder, {**CHANGES, **often})
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            reach("sample")

    watching = threading.Thread(target=sample)
    watching.start()
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        lab.run(STAGE)
    finally:
        done.set()
        watching.join()
    return seen


def forked(job: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What `job` gives, run in a fork; SystemExit where it fails."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(job()).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001  told by the exit code
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"the stage ended with status {status}")
    return dict(json.loads(os.read(reading, 1 << 16)))


def main(folder: Path, more: int) -> None:
    def parents() -> dict[str, int]:
        Lab.make(folder / "without", CHANGES).prepare(STAGE)
        return {}

    forked(parents)
    lab = Lab.make(folder / "without", CHANGES)
    lab.linked_copy(folder / "with")
    without = forked(lambda: train(folder / "without", None))
    found = forked(lambda: train(folder / "with", without["peak"] + more))
    moved = lab.commit(STAGE).result["trainable_parameters"] * 4
    print(json.dumps({"state": 4 * moved, "without": without["peak"], **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
