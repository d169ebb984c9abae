"""Whether a failure is the store's, and what becomes of it: by looks and a clock that the test gives."""

from __future__ import annotations

import pytest

from cache_store.errors import CorruptShard, MissingShard, StorageDenied, StorageFull, StorageUnavailable, StoreError
from orchestrator.execution.store_watch import LOOK_S, Held, StoreWatch, Verdict
from orchestrator.runners.base import Failed


class World:
    """A store that is there or away, and a clock; looks are taken at once, or never come back."""

    def __init__(self, deadline_s: float = 60.0) -> None:
        self.now, self.hangs, self.looks = 100.0, False, 0
        self.reason: str | None = "away"
        self.watch = StoreWatch(self.look, deadline_s, clock=lambda: self.now, start=self.start)

    def look(self) -> str | None:
        self.looks += 1
        return self.reason

    def start(self, work: object) -> None:
        if not self.hangs:
            assert callable(work)
            work()

    def settle(self) -> list[tuple[str, Verdict]]:
        """Ask twice: a look begun by the first is known at the second."""
        return [(held.node_id, verdict) for _ in range(2) for held, verdict in self.watch.settle()]


def held(node: str, error: Exception | None = None) -> Held:
    return Held(node, Failed(node, error or StorageUnavailable("no answer"), lost=False), "node-a")


def test_where_the_store_is_there_a_failure_counts_as_any_other() -> None:
    world = World()
    world.reason = None
    assert world.watch.hold(held("a"))
    assert world.settle() == [("a", Verdict.COUNTS)]
    assert not world.watch.holds


def test_while_it_is_away_failures_are_held_and_cost_nothing_once_it_is_back() -> None:
    world = World()
    world.watch.hold(held("a"))
    assert world.settle() == []
    assert world.watch.away == "away"
    world.watch.hold(held("b", MissingShard("gone")))
    world.now += 30
    assert world.settle() == []
    world.reason = None
    world.now += LOOK_S
    assert world.settle() == [("a", Verdict.FREE), ("b", Verdict.FREE)]
    assert world.watch.away is None
    # Another outage has the whole time again.
    world.reason = "away"
    world.now += 1000
    world.watch.hold(held("a"))
    assert world.settle() == []


@pytest.mark.parametrize("hangs", [False, True])
def test_it_is_not_waited_for_longer_than_the_deadline_even_where_a_look_hangs(hangs: bool) -> None:
    world = World(deadline_s=60.0)
    world.hangs = hangs
    world.watch.hold(held("a"))
    for _ in range(29):
        assert world.settle() == []
        world.now += LOOK_S
    world.now += 2 * LOOK_S
    assert world.settle() == [("a", Verdict.GIVEN_UP)]
    assert world.looks == (0 if hangs else 29)


def test_only_faults_that_an_outage_can_show_as_are_held() -> None:
    world = World()
    errors = {
        StorageUnavailable: True,
        MissingShard: True,
        CorruptShard: True,
        StoreError: True,
        StorageFull: False,
        StorageDenied: False,
        ValueError: False,
    }
    assert {kind: world.watch.hold(held("a", kind("x"))) for kind in errors} == errors
