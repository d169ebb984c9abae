"""Find the settings nearest to those asked for with which stages fit a device. Pure: what settings take is asked of the
caller.

Nearest is what changes the least of what is learned: first what leaves every sum as it is (smaller micro-batches,
activations computed again), then what rounds (moments in 8 bits, frozen matrices in 8 or 4), then what trains less (the
LM head left as it is, low-rank adapters). Micro-batches of a few samples keep a device waiting, so recomputing goes
before them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

#: Micro-batches smaller than this cost more time than recomputing activations does: 11,726 tokens a second with one
#: sample of 1,024, 49,400 with four (benchmarks/results/lm_memory-cuda.md, lm_memory-cuda-micro4.md).
EASY_MICRO = 4
#: How far such small micro-batches are from what was asked.
_SMALL = 2

#: Changed settings of `training`, dotted.
Settings = Mapping[str, Any]
#: What settings of `training` may become, and how far that is from what was asked.
CHOICES: dict[str, tuple[tuple[int, Any], ...]] = {
    "activation_checkpointing": ((1, True),),
    "optimizer.name": ((4, "adamw8bit"),),
    "frozen_weights": ((5, "int8"), (6, "nf4")),
    "lm_head": ((12, "frozen"),),
    "lora.rank": ((24, 16),),
}


@dataclass(frozen=True)
class Fit:
    """Settings with which everything fits, and what they take at most."""

    settings: Settings
    peak_bytes: int


def nearest_fit(peak: Callable[[Settings], int | None], usable: int, micro: int, given: Settings) -> Fit | None:
    """Return the nearest settings whose peak is at most `usable` bytes; None where none have one.

    `peak`: what changed settings take at most (None: they do not go together). `micro`: samples of a micro-batch now;
    it only becomes smaller. `given`: what the settings of `CHOICES` are now; those that it does not name stay.
    """
    for least, choice in _nearest_first(micro, given):
        found = largest_micro(partial(_peak_with, peak, choice, micro), usable, least, micro)
        if found is not None:
            size, taken = found
            return Fit(_with_micro(choice, size, micro), taken)
    return None


def largest_micro(peak: Callable[[int], int | None], usable: int, least: int, most: int) -> tuple[int, int] | None:
    """Return the largest micro-batch from `least` to `most` whose peak is at most `usable` bytes, and that peak; None
    where `least` does not fit. The peak grows with the micro-batch."""
    taken = peak(least)
    if taken is None or taken > usable:
        return None
    best = (least, taken)
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        taken = peak(middle)
        if taken is None or taken > usable:
            high = middle - 1
        else:
            low, best = middle, (middle, taken)
    return best


def evened(micro: int, batch: int) -> int:
    """Return the smallest micro-batch that takes as many steps through a batch as `micro`: the same passes, less
    memory."""
    return -(-batch // -(-batch // micro))


def _peak_with(peak: Callable[[Settings], int | None], settings: Settings, micro: int, size: int) -> int | None:
    return peak(_with_micro(settings, size, micro))


def _with_micro(settings: Settings, size: int, micro: int) -> Settings:
    return settings if size == micro else {"micro_batch": size, **settings}


def _nearest_first(micro: int, given: Settings) -> Iterator[tuple[int, Settings]]:
    """(Least micro-batch, changed settings), the nearest first."""
    unchanged: tuple[int, Settings] = (0, {})
    options = [[unchanged, *([(_SMALL, unchanged[1])] if micro > EASY_MICRO else [])]]
    for key, choices in CHOICES.items():
        others: list[tuple[int, Settings]] = [
            (distance, {key: value}) for distance, value in choices if key in given and given[key] != value
        ]
        options.append([unchanged, *others])
    combined = []
    for small, *changes in itertools.product(*options):
        settings = {key: value for _, change in changes for key, value in change.items()}
        least = 1 if small[0] or micro <= EASY_MICRO else EASY_MICRO
        combined.append((small[0] + sum(distance for distance, _ in changes), least, settings))
    combined.sort(key=lambda item: item[0])
    for _, least, settings in combined:
        yield least, settings
