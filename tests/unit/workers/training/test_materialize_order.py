"""In which order a worker fills a set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from workers.specs.orders import FirstAsked
from workers.tasks.materialize import _Work
from workers.training.shuffle import order_seed, shard_order, windowed_order


def work(missing: list[int], first: FirstAsked | None) -> list[int]:
    boundary: Any = SimpleNamespace(
        spec=SimpleNamespace(shards=12), snapshots=SimpleNamespace(missing=lambda: list(missing))
    )
    return _Work(boundary, 7, first).missing()


def test_without_an_order_shards_are_made_as_they_lie() -> None:
    assert work([3, 4, 9], None) == [3, 4, 9]


def test_shards_are_made_as_the_epoch_of_the_stage_will_open_them() -> None:
    first, seed = FirstAsked("stage2-seg2", 2), order_seed(7, "stage2-seg2")
    order = windowed_order(seed, 2, [5] * 12, 3)
    opened = list(dict.fromkeys((order // 5).tolist()))
    made = work(list(range(12)), first)
    assert made == shard_order(seed, 2, 12).tolist()
    assert made != work(list(range(12)), FirstAsked("stage3-seg3", 2))
    # A shard is asked for at most a window's width from its turn.
    assert all(abs(made.index(shard) - place) <= 3 for place, shard in enumerate(opened))
    assert work([1, 5, 8], first) == [shard for shard in made if shard in (1, 5, 8)], "the rest is there"
