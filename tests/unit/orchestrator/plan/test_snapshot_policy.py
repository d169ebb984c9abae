"""Snapshots or recompute."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_store.errors import ConfigError
from orchestrator.costs.snapshot_policy import BoundaryPrice, decide, peak_bytes
from orchestrator.units import human_bytes


def boundary(set_bytes: int, images: int, previous: int, recompute: int) -> BoundaryPrice:
    return BoundaryPrice("seg", set_bytes, images, previous, recompute)


def sources(*boundaries: BoundaryPrice, mode: str = "auto", budget: int | None = None, keep: bool = False) -> str:
    decisions = decide(boundaries, mode, budget, keep=keep)  # type: ignore[arg-type]
    return "".join(decision.source[0] for decision in decisions)


def test_never_and_always_are_obeyed() -> None:
    useless = boundary(10, 100, 100, 1)
    assert sources(useless, useless, mode="never") == "rr"
    assert sources(useless, useless, mode="always") == "ss"


def test_reading_each_view_once_saves_nothing_on_one_boundary() -> None:
    assert sources(boundary(10, 100, 100, 100)) == "r"
    assert sources(boundary(10, 100, 100, 200)) == "s"


def test_rolling_forward_pays_even_when_each_view_is_read_once() -> None:
    """Three hops of equal work w: recomputing costs w + 2w + 3w, rolling forward 3w."""
    chain = [boundary(10, 100 * k, 100, 100 * k) for k in (1, 2, 3)]
    assert sources(*chain) == "sss"


def test_a_budget_recomputes_what_does_not_fit_and_still_stores_the_rest() -> None:
    chain = [boundary(80, 100, 100, 1000), boundary(40, 200, 100, 2000), boundary(20, 300, 100, 3000)]
    assert sources(*chain, budget=None) == "sss"
    assert sources(*chain, budget=120) == "sss"
    assert sources(*chain, budget=100) == "rss"
    assert sources(*chain, budget=50) in ("rsr", "rrs")
    assert sources(*chain, budget=50) == "rrs"
    assert sources(*chain, budget=10) == "rrr"
    reason = decide(chain, "auto", 10)[0].reason
    assert reason == "80 B of snapshots exceed this regime's budget of 10 B"


def test_kept_sets_are_all_alive_at_once() -> None:
    chain = [boundary(80, 100, 100, 1000), boundary(40, 200, 100, 2000), boundary(20, 300, 100, 3000)]
    assert sources(*chain, budget=140, keep=True) == "sss"
    assert sources(*chain, budget=120, keep=True) == "rss"


def test_insisting_on_what_does_not_fit_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"need 120 B at one time, the budget allows 119 B \(120 > 119 bytes\)"):
        sources(boundary(80, 1, 1, 1), boundary(40, 1, 1, 1), mode="always", budget=119)


def test_two_neighbours_are_alive_while_one_is_rolled_forward() -> None:
    assert peak_bytes([5, 3, 9, 1]) == 12
    assert peak_bytes([5]) == 5
    assert peak_bytes([]) == 0
    assert peak_bytes([5, 0, 9]) == 9
    assert peak_bytes([5, 3, 9], keep=True) == 17


sizes = st.integers(0, 50)
boundaries = st.lists(st.builds(boundary, sizes, sizes, sizes, sizes), max_size=6)


@given(boundaries, st.one_of(st.none(), st.integers(0, 120)))
def test_auto_finds_the_least_work_that_fits(chain: list[BoundaryPrice], budget: int | None) -> None:
    def work(stored: tuple[bool, ...]) -> int:
        total = 0
        for index, item in enumerate(chain):
            if not stored[index]:
                total += item.recompute
            elif index and stored[index - 1]:
                total += item.make_from_previous
            else:
                total += item.make_from_images
        return total

    def fits(stored: tuple[bool, ...]) -> bool:
        alive = [item.set_bytes if kept else 0 for item, kept in zip(chain, stored, strict=True)]
        return budget is None or peak_bytes(alive) <= budget

    chosen = tuple(decision.source == "snapshots" for decision in decide(chain, "auto", budget))
    assert fits(chosen)
    assert work(chosen) == min(work(stored) for stored in product([False, True], repeat=len(chain)) if fits(stored))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000_000, "2.0 GB"), (7e12, "7.0 TB")],
)
def test_bytes_read_naturally(count: float, text: str) -> None:
    assert human_bytes(count) == text


def seconds(set_bytes: int, images: float, previous: float, recompute: float, read: float) -> BoundaryPrice:
    return BoundaryPrice("seg", set_bytes, images, previous, recompute, read, in_seconds=True)


def test_reading_counts_where_costs_are_in_seconds() -> None:
    cheap, dear = seconds(10, 5.0, 5.0, 10.0, 1.0), seconds(10, 5.0, 5.0, 10.0, 6.0)
    assert sources(cheap) == "s"
    assert sources(dear) == "r"
    assert decide([cheap], "auto", None)[0].reason == "5.0 s to make and 1.0 s to read against 10 s to recompute"
    assert decide([dear], "auto", None)[0].reason == "10 s against 5.0 s to make and 6.0 s to read snapshots"


def test_a_boundary_that_only_helps_the_next_says_so() -> None:
    chain = [seconds(10, 5.0, 5.0, 4.0, 0.5), seconds(10, 30.0, 5.0, 40.0, 0.5)]
    assert sources(*chain) == "ss"
    reason = decide(chain, "auto", None)[0].reason
    assert reason == "5.0 s to make and 0.5 s to read: saves nothing here, but lets the next boundary be rolled forward"


@given(boundaries, st.one_of(st.none(), st.integers(0, 120)))
def test_without_reading_seconds_decide_as_counted_work_does(chain: list[BoundaryPrice], budget: int | None) -> None:
    timed = [
        seconds(each.set_bytes, each.make_from_images, each.make_from_previous, each.recompute, 0.0) for each in chain
    ]
    assert sources(*timed, budget=budget) == sources(*chain, budget=budget)
