"""Regimes over seeds: what is compared with what, and when a difference counts as shown."""

from __future__ import annotations

import pytest

from orchestrator.reports.tables.seeds import Score, cells, over_seeds, quantile


def scores(group: str, regime: str, *values: float) -> list[Score]:
    return [Score(group, regime, seed, value) for seed, value in enumerate(values)]


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (9, 2.262), (30, 2.042), (60, 2.000), (120, 1.980)])
def test_quantiles_are_those_of_the_tables(degrees: int, expected: float) -> None:
    assert quantile(degrees) == pytest.approx(expected, abs=1e-3)


def test_one_seed_gives_no_table() -> None:
    assert over_seeds([], "e2e") == ()
    assert over_seeds([*scores("", "e2e", 0.5), *scores("", "lw", 0.4)], "e2e") == ()


def test_a_difference_is_shown_when_its_interval_leaves_zero_out() -> None:
    """Pairs decide: the spread over seeds is ten times the difference, which is nearly the same in each."""
    found = over_seeds([*scores("", "e2e", 0.50, 0.60, 0.70), *scores("", "lw", 0.49, 0.589, 0.691)], "e2e")
    assert found[1].difference is not None
    assert found[1].difference.mean == pytest.approx(-0.01)
    # Differences -0.010, -0.011, -0.009: standard deviation 0.001, half the interval 4.303 * 0.001 / sqrt(3).
    assert found[1].difference.interval == pytest.approx((-0.012484, -0.007516), abs=1e-6)
    assert found[1].difference.shown
    assert cells(found, share=True)[1] == (
        "lw", "3", "59.00", "49.00 to 69.10", "-1.00 to e2e", "-1.25 to -0.75", "differs"
    )  # fmt: skip


def test_only_seeds_that_both_have_make_pairs_and_one_pair_has_no_interval() -> None:
    given = [*scores("", "e2e", 2.0, 2.2), Score("", "segprop", 1, 2.1), Score("", "segprop", 7, 1.0)]
    (_, row) = over_seeds(given, "e2e")
    assert row.difference is not None
    assert (row.difference.n, row.difference.interval, row.difference.shown) == (1, None, False)
    assert row.difference.mean == pytest.approx(-0.1)
    assert cells([row], share=False)[0][-1] == "no difference shown"


def test_without_a_yardstick_groups_are_compared_with_the_first() -> None:
    given = [*scores("base 1", "segprop", 0.5, 0.6), *scores("base 2", "segprop", 0.6, 0.7)]
    first, second = over_seeds(given, None)
    assert first.difference is None
    assert second.difference is not None
    assert second.difference.against == "base 1"
    assert second.difference.mean == pytest.approx(0.1)
