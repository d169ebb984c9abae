"""Seconds of stages whose tensors cross the link to the host."""

from __future__ import annotations

import pytest

from orchestrator.config.devices import DEVICES
from orchestrator.config.rates import Rates
from orchestrator.costs.formulas import TASK_SECONDS, Estimate
from orchestrator.costs.link import LinkBytes, link_bytes, with_link
from workers.specs.experiment import TrainSpec
from workers.specs.memory import MemorySpec

TRAIN = TrainSpec(epochs=2, batch_size=8, micro_batch=2)
GIB = 1 << 30
L4 = DEVICES["l4"].rates(4)


def test_frozen_weights_cross_twice_a_micro_batch_and_updates_on_the_host_both_ways() -> None:
    assert link_bytes(MemorySpec(), away=0, trained=100) == LinkBytes(0, 0)
    assert link_bytes(MemorySpec(frozen="host"), away=7, trained=100) == LinkBytes(14, 0)
    for tier in ("host", "disk"):
        assert link_bytes(MemorySpec(optimizer=tier), away=7, trained=100) == LinkBytes(114, 100)  # type: ignore[arg-type]
    assert LinkBytes(114, 100).of_step(4) == 556
    # 50 micro-batches and 12 whole batches (the short one is dropped) in each of two epochs.
    assert LinkBytes(114, 100).of_stage(TRAIN, 100) == 100 * 114 + 24 * 100


def test_a_slow_link_decides_how_long_a_stage_takes() -> None:
    found = with_link(Estimate(seconds=1.0), TRAIN, 100, LinkBytes(2 * GIB), L4)
    # 50 micro-batches in each of two epochs, out and back over 32 GB/s.
    assert found.seconds == pytest.approx(TASK_SECONDS + 2 * 50 * 2 * GIB / 32e9)
    assert found.link_bytes == 2 * 50 * 2 * GIB


def test_what_computing_hides_costs_nothing_but_updates_wait_for_weights() -> None:
    slow = Estimate(seconds=1e6)
    assert with_link(slow, TRAIN, 100, LinkBytes(GIB), L4).seconds == slow.seconds
    assert with_link(slow, TRAIN, 100, LinkBytes(GIB, GIB), L4).seconds == pytest.approx(1e6 + 24 * GIB / 32e9)


@pytest.mark.parametrize(("away", "rates"), [(0, L4), (GIB, Rates({"fp32": 1e9}))])
def test_nothing_away_or_no_known_link_costs_nothing(away: int, rates: Rates) -> None:
    assert with_link(Estimate(seconds=1.0), TRAIN, 100, LinkBytes(2 * away), rates).seconds == 1.0
