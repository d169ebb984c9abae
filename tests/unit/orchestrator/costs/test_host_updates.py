"""Seconds of updates on the host, and what they change about `memory: auto`."""

from __future__ import annotations

import pytest

from orchestrator.config.devices import DEVICES
from orchestrator.config.rates import Rates
from orchestrator.costs.formulas import Estimate
from orchestrator.costs.host_updates import (
    DISK_BYTES_PER_S,
    FLOAT32_NS,
    MEMORY_BYTES_PER_S,
    ROUNDED_NS,
    Updated,
    update_seconds,
    with_updates,
)
from orchestrator.costs.link import link_bytes, with_link
from orchestrator.costs.tiers import Limits, Option, cheapest
from workers.specs.experiment import OptimizerSpec, TrainSpec
from workers.specs.memory import MemorySpec

GIB = 1 << 30
NUMBERS = 10**9
WIDE, NARROW = Updated(NUMBERS, 4 * NUMBERS), Updated(NUMBERS, 2 * NUMBERS)
ADAMW = OptimizerSpec()
HOST, DISK = MemorySpec(optimizer="host"), MemorySpec(optimizer="disk", disk="/nvme")
ONE, MANY = Rates({"fp32": 1e12}, threads=1), Rates({"fp32": 1e12}, threads=1000)


def test_updates_on_the_device_wait_for_nothing_more() -> None:
    for memory in (MemorySpec(), MemorySpec(masters="device")):
        assert update_seconds(ADAMW, memory, NARROW, ONE) == 0.0


@pytest.mark.parametrize(
    ("spec", "memory", "updated", "ns"),
    [
        (ADAMW, HOST, WIDE, FLOAT32_NS),
        (ADAMW, HOST, NARROW, ROUNDED_NS["stochastic"]),
        (OptimizerSpec(rounding="compensated"), HOST, NARROW, ROUNDED_NS["compensated"]),
        (ADAMW, MemorySpec(optimizer="host", masters="host"), NARROW, FLOAT32_NS),
    ],
)
def test_few_cores_compute_for_longer_than_memory_moves(
    spec: OptimizerSpec, memory: MemorySpec, updated: Updated, ns: float
) -> None:
    assert update_seconds(spec, memory, updated, ONE) == pytest.approx(ns)


def test_many_cores_wait_for_memory_and_files_for_their_disk() -> None:
    # Weights, two moments: read and written; gradients: read. Four bytes each.
    assert update_seconds(ADAMW, HOST, WIDE, MANY) == pytest.approx(28 * NUMBERS / MEMORY_BYTES_PER_S)
    # Beside a GPU the copies of weights lie with the states.
    assert update_seconds(ADAMW, DISK, WIDE, MANY) == pytest.approx(2 * 12 * NUMBERS / DISK_BYTES_PER_S)


def test_beside_a_cpu_the_host_costs_nothing_more_and_files_do() -> None:
    assert update_seconds(ADAMW, HOST, WIDE, ONE, on_host=True) == 0.0
    assert update_seconds(ADAMW, DISK, WIDE, ONE, on_host=True) == pytest.approx(16 * NUMBERS / DISK_BYTES_PER_S)


def test_a_stage_waits_once_an_update() -> None:
    train = TrainSpec(epochs=2, batch_size=8)
    assert with_updates(Estimate(seconds=1.0), train, 100, 0.5).seconds == 1.0 + 2 * 12 * 0.5


def option(memory: MemorySpec, peak_gib: int, computing: float, *, waits: bool) -> Option:
    """A stage of a billion numbers in bfloat16 that takes so much of the device and computes for so long."""
    train, rates = TrainSpec(epochs=1, batch_size=8, micro_batch=8), DEVICES["l4"].rates(8)
    predicted = Estimate(seconds=computing, peak_bytes=peak_gib * GIB)
    predicted = with_link(predicted, train, 80, link_bytes(memory, away=0, trained=NARROW.weights_bytes), rates)
    if waits:
        predicted = with_updates(predicted, train, 80, update_seconds(ADAMW, memory, NARROW, rates))
    return Option(memory, train, predicted)


@pytest.mark.parametrize(("waits", "chosen"), [(False, "host"), (True, "device")])
def test_what_the_host_takes_for_updates_decides_for_computing_activations_again(waits: bool, chosen: str) -> None:
    """Ten updates: 30 s with the state on the host, 40 s with activations computed again in its place."""
    options = [
        option(MemorySpec(optimizer="host"), 20, 30.0, waits=waits),
        option(MemorySpec(activations="recompute"), 20, 40.0, waits=waits),
    ]
    found = cheapest(options, Limits(22 * GIB))
    assert found is not None
    assert found.memory.optimizer == chosen
