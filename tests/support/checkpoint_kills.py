"""Run as a program: trains a small stage with a checkpoint begun after every step, and kills it inside checkpoints that
are being written beside the steps, at one point after another, until it gets through.

    python checkpoint_kills.py FOLDER

Every run of the stage is a fork of this process, which itself trains nothing, so that nothing is imported more than
once. Prints JSON: the points at which it was killed, the digests of the stage's parts of every run that came to its
end, and of one that was never killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from running import Lab, digests

from cache_store import crashpoints
from orchestrator.plan.graph import Node
from workers import tensor_files
from workers.specs.orders import CHECKPOINT_MEMORY, WorkOrder
from workers.training import clocks

STAGE = "segprop/stage1-base"
CHANGES = {"training.epochs": 2, "data.views": 2, "training.precision": "bf16", "training.channels_last": True}
#: (point, visit, bytes that may be copied for an update). Visits are counted by each run anew.
KILLS = (
    ("checkpoint.piece", 1, 1 << 30),
    ("checkpoint.piece", 30, 1 << 30),
    ("checkpoint.copied", 2, 1 << 30),
    ("checkpoint.piece", 200, 1 << 30),
    ("stage.step", 3, 1 << 30),
    ("storage.before-rename", 2, 1 << 30),
    ("checkpoint.written", 2, 1 << 30),
    ("storage.after-link", 1, 0),
    ("checkpoint.piece", 150, 0),
    ("checkpoint.copied", 2, 200_000),
    ("checkpoint.committed", 2, 200_000),
)


@dataclass
class Allowing(Lab):
    """A lab whose checkpoints may copy so many bytes."""

    checkpoint_memory: int = CHECKPOINT_MEMORY

    def order(self, node: Node) -> WorkOrder:
        return replace(super().order(node), checkpoint_memory=self.checkpoint_memory)


def run_to_its_end(folder: Path, label: str, changes: dict[str, object], checkpoint_memory: int) -> None:
    torch.set_num_threads(1)
    prepared = Lab.make(folder, {**CHANGES, **changes}).prepared
    Allowing(prepared, checkpoint_memory=checkpoint_memory).run(label)


def forked(folder: Path, label: str, kill: tuple[str, int, int] | None, changes: dict[str, object]) -> int:
    """Run a node in a fork; the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        code, memory = 1, CHECKPOINT_MEMORY
        try:
            clocks.REPORT_EVERY_S = 0.0
            tensor_files.PIECE_BYTES = 16 << 10
            if kill is not None:
                point, visit, memory = kill
                marker = folder / f"killed-{point}-{visit}-{memory}"
                crashpoints._plans, crashpoints._armed = crashpoints._parse(f"{point}:{visit}:{marker}"), True
            run_to_its_end(folder, label, changes, memory)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the stage failed by itself"
    return 0


def main(folder: Path) -> None:
    reference, killed = folder / "reference", folder / "killed"
    forked(reference, STAGE, None, {})
    lab = Lab.make(reference, CHANGES)
    lab.linked_copy(killed).forget(STAGE)
    often = {"training.checkpoint_every_s": 1e-6}
    ended: list[dict[str, object]] = []

    def goes_through(kill: tuple[str, int, int] | None) -> bool:
        if forked(killed, STAGE, kill, often) == signal.SIGKILL:
            return False
        run = Lab.make(killed, {**CHANGES, **often})
        commit, left = run.commit(STAGE), run.nodes.checkpoints(run.node(STAGE).id)
        left_at = [str(each.position) for each in left]
        ended.append({"parts": digests(commit), "resumed": commit.result["resumed"], "left": left_at})
        run.forget(STAGE)
        return True

    # From its first step a run reaches every point.
    points = [f"{kill[0]}:{kill[1]}" for kill in KILLS if not goes_through(kill) or not goes_through(kill)]
    goes_through(None)
    print(json.dumps({"points": points, "ended": ended, "reference": digests(lab.commit(STAGE))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
