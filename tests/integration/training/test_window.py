"""A stage whose epochs go by shard with a window, within a limit to the memory of shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from running import Lab, StopAfter, digests

from cache_store.errors import Interrupted
from workers.tasks.execute import execute
from workers.training import clocks

STAGE = "segprop/stage3-seg3"
#: Two groups of sixteen samples a shard at the boundary that is read, three shards of which one or two are open.
WINDOW = {"snapshots.shuffle": "window", "snapshots.window": 1, "snapshots.mode": "always"}


@pytest.fixture(autouse=True)
def _look_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)


def test_a_windowed_stage_resumes_with_the_same_bits_and_does_not_depend_on_the_limit(tmp_path: Path) -> None:
    """The order is a function of seed, epoch and geometry; it is part of the stage, and of no snapshot set."""
    globally = Lab.make(tmp_path / "lab", {"snapshots.mode": "always"})
    globally.run(STAGE)
    lab = Lab.make(tmp_path / "lab", WINDOW)
    node, shards = lab.node(STAGE), globally.snapshots("segprop/snapshot seg2 train view 0").spec.shards
    assert shards == 3
    assert node.id != globally.node(STAGE).id
    snapshot = "segprop/snapshot seg1 train view 0"
    assert lab.node(snapshot).id == globally.node(snapshot).id

    whole = lab.run(STAGE)
    assert digests(whole) != digests(globally.commit(STAGE))
    lab.forget(STAGE)
    order = dataclasses.replace(lab.order(node), snapshot_memory=1)
    with pytest.raises(Interrupted, match="epoch 2, step 2"):
        execute(order, StopAfter(8))
    resumed = execute(order, lab.control)
    assert resumed.result["resumed"] == 1
    assert resumed.result["snapshot"]["misses"] == 0
    assert digests(resumed) == digests(whole)
