"""Which parts are trained when: cycles and draws of block schedules."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from workers.specs.tasks import BlockSchedule
from workers.training.updates.active_parts import active_parts, turn_of

BLOCKS = (("a",), ("b",), ("c", "d"), ("e",))


def schedule(**changes: Any) -> BlockSchedule:
    return BlockSchedule(**{"blocks": BLOCKS, "steps": 3, "order": "ascending", **changes})


def turns(made: BlockSchedule, count: int, seed: int = 0) -> list[frozenset[str]]:
    return [active_parts(made, (seed, "stage", "x"), turn) for turn in range(count)]


def test_a_turn_lasts_its_steps() -> None:
    assert [turn_of(schedule(), step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_cycles_go_up_or_down_and_begin_again() -> None:
    up = [frozenset(block) for block in BLOCKS]
    assert turns(schedule(), 9) == [*up, *up, up[0]]
    assert turns(schedule(order="descending"), 5) == [*up[::-1], up[-1]]


def test_every_cycle_of_a_random_order_has_each_block_once_and_cycles_differ() -> None:
    found = turns(schedule(order="random"), 40)
    cycles = [tuple(found[first : first + 4]) for first in range(0, 40, 4)]
    assert all(set(cycle) == {frozenset(block) for block in BLOCKS} for cycle in cycles)
    assert len(set(cycles)) > 3


@pytest.mark.parametrize("count", [1, 2, 4])
def test_draws_are_of_so_many_different_blocks_beside_what_is_always_trained_and_all_as_likely(count: int) -> None:
    made = schedule(order="sampled", count=count, always=("head",))
    found = turns(made, 4000)
    assert all("head" in parts and len({"d"} ^ parts) for parts in found)
    blocks = [{block for block in BLOCKS if set(block) <= parts} for parts in found]
    assert {len(chosen) for chosen in blocks} == {count}
    seen = Counter(block for chosen in blocks for block in chosen)
    assert all(abs(seen[block] / 4000 - count / 4) < 0.03 for block in BLOCKS)
    if count == 1:
        again = sum(one == other for one, other in pairwise(found)) / 4000
        assert abs(again - 1 / 4) < 0.03, "a draw does not know the one before"


@pytest.mark.parametrize("order", ["random", "sampled"])
def test_draws_depend_on_the_seed_and_on_nothing_else(order: str) -> None:
    made = schedule(order=order)
    assert turns(made, 20) == turns(made, 20)
    assert turns(made, 20) != turns(made, 20, seed=1)
