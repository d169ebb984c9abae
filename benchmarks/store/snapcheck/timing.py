"""Cases taken in turns, and what their times say of each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Json

#: A case does its work once and returns the seconds that count.
Case = Callable[[], float]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _seconds(case: Case) -> Json:
    return {"s": case()}


def compare(cases: Mapping[str, Case], bytes_of_a_case: int, rounds: int, ours: str = "ours") -> Json:
    """GB/s of every case, and `ours` as a multiple of each, round by round. The case `ours` runs twice a round: how far
    the two lie apart (`control`) is what a difference must exceed to mean anything."""
    runs = harness.interleave(
        {name: partial(_seconds, case) for name, case in {**cases, "control": cases[ours]}.items()},
        rounds,
    )
    seconds = {name: [run["s"] for run in taken] for name, taken in runs.items()}
    return {
        name: {
            "gb_per_s": harness.summary([bytes_of_a_case / s / 1e9 for s in taken]),
            "ours_is": harness.summary([other / own for own, other in zip(seconds[ours], taken, strict=True)]),
        }
        for name, taken in seconds.items()
    }


def drop_from_memory(paths: Iterable[Path]) -> None:
    """Have the system forget the pages of these files, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
