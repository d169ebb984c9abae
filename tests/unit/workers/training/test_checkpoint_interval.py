"""How often a checkpoint pays."""

from __future__ import annotations

import math

import pytest

from workers.training.checkpoints.interval import MOST_SHARE, cost_s, interval_s

HOUR, DAY = 3600.0, 86400.0


def lost(every: float, cost: float, between: float) -> float:
    """Expected time over useful time, with interruptions at random (Daly's equation 20, restart left out)."""
    return between * math.expm1((every + cost) / between) / every


@pytest.mark.parametrize("cost", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("between", [HOUR, DAY, 30 * DAY])
def test_the_interval_loses_least_of_all_that_are_not_too_often(cost: float, between: float) -> None:
    found = interval_s(cost, between)
    shortest = cost / MOST_SHARE
    assert found >= shortest
    best = min(lost(max(shortest, found * factor), cost, between) for factor in (0.5, 0.8, 0.95, 1.0, 1.05, 1.2, 2.0))
    assert lost(found, cost, between) == pytest.approx(best, rel=1e-4)


def test_a_checkpoint_of_a_second_in_a_day_is_worth_taking_every_seven_minutes() -> None:
    assert interval_s(1.0, DAY) == pytest.approx(math.sqrt(2 * DAY), rel=0.01)


def test_checkpoints_never_take_more_than_their_share() -> None:
    assert interval_s(10.0, 60.0) == 1000.0
    assert interval_s(10.0, 1.0) == 1000.0


def test_a_checkpoint_that_costs_nothing_may_be_taken_at_any_time() -> None:
    assert interval_s(0.0, DAY) == 0.0


def test_what_is_written_beside_training_counts_by_the_cores_it_takes() -> None:
    assert cost_s(0.5, 3.0, threads=1) == 3.5
    assert cost_s(0.5, 3.0, threads=2) == 3.5
    assert cost_s(0.5, 3.0, threads=16) == pytest.approx(0.5 + 3.0 / 8)
