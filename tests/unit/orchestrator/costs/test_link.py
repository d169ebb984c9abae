"""Seconds of stages whose tensors cross the link to the host."""

from __future__ import annotations

import pytest

from orchestrator.config.devices import DEVICES
from orchestrator.config.rates import Rates
from orchestrator.costs.formulas import TASK_SECONDS, Estimate, with_link
from workers.specs.experiment import TrainSpec

TRAIN = TrainSpec(epochs=2, batch_size=8, micro_batch=2)
GIB = 1 << 30


def test_a_slow_link_decides_how_long_a_stage_takes() -> None:
    found = with_link(Estimate(seconds=1.0), TRAIN, 100, GIB, DEVICES["l4"].rates(4))
    # 50 micro-batches in each of two epochs, out and back over 32 GB/s.
    assert found.seconds == pytest.approx(TASK_SECONDS + 2 * 50 * 2 * GIB / 32e9)


def test_what_computing_hides_costs_nothing() -> None:
    slow = Estimate(seconds=1e6)
    assert with_link(slow, TRAIN, 100, GIB, DEVICES["l4"].rates(4)) == slow


@pytest.mark.parametrize(("away", "rates"), [(0, DEVICES["l4"].rates(4)), (GIB, Rates({"fp32": 1e9}))])
def test_nothing_away_or_no_known_link_costs_nothing(away: int, rates: Rates) -> None:
    assert with_link(Estimate(seconds=1.0), TRAIN, 100, away, rates).seconds == 1.0
