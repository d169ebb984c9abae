"""Drivers, workers, leases and commits under any order of faults: the rules hold, and breaking one is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import simulation
from simulation import SimulatedStorage, Violation, play, simulate

from cache_store.records.nodes import NodeStore
from orchestrator.execution import run_lease
from orchestrator.execution.ready_queue import ReadyQueue
from orchestrator.execution.retry import NodeRetries, Retry


@pytest.mark.parametrize("first", range(0, 1000, 125))
def test_one_commit_a_node_one_driver_a_run_and_an_end_whatever_happens(first: int) -> None:
    count, faults = play(first, 125)
    assert count == 125
    assert faults.keys() == {
        "pause",
        "request refused",
        "reply lost",
        "worker lost",
        "driver killed",
        "second driver",
        "taken over",
    }


def test_a_seed_is_one_interleaving() -> None:
    found = [(world.now, world.events, world.files.keys()) for world in (simulate(7), simulate(7))]
    assert found[0][:2] == found[1][:2]


def _create_over(self: SimulatedStorage, path: str, data: bytes) -> bool:
    self._request()
    if path in self._world.files and path.endswith("/commit.json"):
        self._world.violation(f"{path} was made twice")
    self._put(path, data)
    return True


def _looks_away(*_: Any) -> None:
    pass


BROKEN: dict[str, tuple[object, str, Callable[..., Any], str]] = {
    "creation is not exclusive": (SimulatedStorage, "_create", _create_over, "twice"),
    "a silent driver is not waited for": (run_lease, "_wait_gone", _looks_away, "took the run from"),
    "attempts have no bound": (NodeRetries, "decide", lambda *_: Retry(0.1), "attempts at a node"),
    "sets are released while they are read": (
        ReadyQueue,
        "_is_releasable",
        lambda self, node_id: node_id in self._committed and node_id not in self._released,
        "was released by the driver whose worker needs it|does not come to an end",
    ),
    "commits are not found again": (NodeStore, "commit_of", lambda *_: None, "is gone|does not come to an end"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_on_purpose_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken, says = BROKEN[what]
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(simulation, "PATIENCE_S", 2_000.0)
    with pytest.raises(Violation, match=says):
        play(0, 400)
