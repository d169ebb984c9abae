"""Seconds that updates take on the host, where `memory` has them computed there. Pure.

A device waits for them: they begin when the backward pass is over. What they take is the larger of what cores compute
and what memory (or the disk) moves.
"""

from __future__ import annotations

import dataclasses

from orchestrator.config.rates import Rates
from orchestrator.costs.formulas import Estimate, steps_to_run
from workers.specs.experiment import OptimizerSpec, TrainSpec
from workers.specs.memory import MemorySpec
from workers.specs.tier_bytes import tier_bytes

#: Nanoseconds of one core for each number of a weight: medians of five updates of 16 Mi numbers, by the clock, on an
#: AMD EPYC without bfloat16 and with nothing beside them (3.4 to 4.5; 14 to 17, 5.2 to 7.1, 4.0 to 5.2; 139 to 162).
FLOAT32_NS = 4.0
ROUNDED_NS = {"stochastic": 16.0, "compensated": 5.6, "nearest": 4.5}
EIGHT_BIT_NS = 150.0
#: Bytes a second that a slot's cores move through the host's memory: eight cores of a server with eight channels.
MEMORY_BYTES_PER_S = 50e9
#: The same of files on an NVMe disk of today, reading and writing in turn.
DISK_BYTES_PER_S = 2e9


@dataclasses.dataclass(frozen=True)
class Updated:
    """What one update changes: numbers, and bytes of the weights that hold them on the device."""

    numbers: int
    weights_bytes: int


def update_seconds(
    spec: OptimizerSpec, memory: MemorySpec, updated: Updated, rates: Rates, *, on_host: bool = False
) -> float:
    """Return the seconds that one update waits for the host, or the disk, beyond what training on the device takes.
    `on_host`: the device is the host, where only the disk is more."""
    if not memory.updates_on_host:
        return 0.0
    held = tier_bytes(spec, memory, updated.numbers, updated.weights_bytes, on_host=on_host)
    # All but gradients, which are read alone, is read and written.
    disk = 2 * held.disk / DISK_BYTES_PER_S
    if on_host:
        return disk
    copies = held.masters or updated.weights_bytes
    moved = (2 * (held.state + copies) + copies) / MEMORY_BYTES_PER_S
    computed = 1e-9 * _ns_a_number(spec, memory, updated) * updated.numbers / rates.threads
    return max(moved, computed, disk)


def with_updates(predicted: Estimate, train: TrainSpec, rows: int, seconds: float) -> Estimate:
    """A stage's predictions with `seconds` more at every update."""
    waiting = steps_to_run(train, rows) * seconds
    return dataclasses.replace(predicted, seconds=predicted.seconds + waiting) if waiting else predicted


def _ns_a_number(spec: OptimizerSpec, memory: MemorySpec, updated: Updated) -> float:
    if spec.name == "adamw8bit":
        return EIGHT_BIT_NS
    rounded = memory.masters == "none" and updated.weights_bytes < 4 * updated.numbers
    return ROUNDED_NS[spec.rounding] if rounded else FLOAT32_NS
