"""Choose where a stage keeps what it holds, where the configuration leaves that open (`memory: auto`). Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.costs.fit import EASY_MICRO
from orchestrator.costs.formulas import Estimate
from workers.specs.experiment import TrainSpec
from workers.specs.memory import AUTO, MemorySpec

#: Entry of `memory` -> what `auto` may become, the nearest to the device first.
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer": ("device", "host", "disk"),
    "frozen": ("device", "host"),
    "activations": ("keep", "recompute", "selective", "host"),
}


@dataclass(frozen=True)
class Option:
    """One way to keep a stage, and what it takes."""

    memory: MemorySpec
    train: TrainSpec
    predicted: Estimate

    @property
    def host_bytes(self) -> int:
        return self.predicted.host_bytes or 0

    @property
    def words(self) -> str:
        """What was chosen, as a message says it."""
        memory, activations = self.memory, self.memory.activations_of(self.train)
        tiers = f"optimizer {memory.optimizer}, frozen {memory.frozen}, activations {activations}"
        return f"{tiers}, micro-batches of {self.train.micro}"


@dataclass(frozen=True)
class Limits:
    """Bytes that there are; None: not known. `device`: for tensors."""

    device: int
    host: int | None = None

    def hold(self, option: Option) -> bool:
        """Whether there is room for an option."""
        return option.predicted.peak_bytes <= self.device and (self.host is None or option.host_bytes <= self.host)


def ways(memory: MemorySpec) -> Iterator[MemorySpec]:
    """Yield everything that a section may mean: itself where nothing in it is `auto`. On disk only where it names a
    folder for that."""
    open_: dict[str, tuple[str, ...]] = {
        key: tuple(choice for choice in choices if choice != "disk" or memory.disk is not None)
        for key, choices in CHOICES.items()
        if getattr(memory, key) == AUTO
    }
    for chosen in itertools.product(*open_.values()):
        settled: dict[str, Any] = dict(zip(open_, chosen, strict=True))
        yield dataclasses.replace(memory, **settled)


def cheapest(options: Iterable[Option], limits: Limits) -> Option | None:
    """Return the option that there is room for and that takes the least time, by nominal speeds; of equally fast ones
    that which sends the least over the link, then that which takes the least of the host. Micro-batches of a few
    samples, which keep a device waiting, only where there is no other way. None where there is room for none."""
    return min((option for option in options if limits.hold(option)), key=_price, default=None)


def smallest(options: Iterable[Option], limits: Limits) -> Option | None:
    """Return, where there is room for none, the option that lacks least: of those that the device holds the one that
    takes the least of the host, else the one that takes the least of the device. None where there is no option."""
    return min(options, key=lambda option: _lack(option, limits), default=None)


def _lack(option: Option, limits: Limits) -> tuple[int, int]:
    return max(option.predicted.peak_bytes, limits.device), option.host_bytes


def _price(option: Option) -> tuple[bool, float, int, int]:
    found = option.predicted
    waits = option.train.micro < min(EASY_MICRO, option.train.batch_size)
    return waits, round(found.seconds, 3), found.link_bytes or 0, option.host_bytes
