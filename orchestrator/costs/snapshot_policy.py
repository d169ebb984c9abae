"""Snapshots or recompute, decided per regime and boundary. Pure.

The measure is forward work, which does not depend on the machine: the same configuration makes the same plan
everywhere. Storing boundary `d` costs one pass per view over what lies between the previous *stored*
boundary and `d` (everything before `d` when there is none); recomputing costs the whole prefix in every epoch
that reads it. The cheapest combination that keeps the bytes alive at one time within the budget wins; on a
tie nothing is stored.

With `snapshots.costs: measured` the measure is seconds (`costs`): loading and augmenting, writing, verifying and
reading count too. The figures are a commit of the store, so every invocation of a run decides alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cache_store.errors import ConfigError
from orchestrator.units import human_bytes, seconds_text

Mode = Literal["auto", "always", "never"]
Source = Literal["images", "snapshots", "recompute"]


@dataclass(frozen=True)
class BoundaryPrice:
    """What the decision needs to know of one boundary; work is in floating-point operations, or in seconds."""

    label: str
    #: All sets of this boundary: every used view of train, and validation.
    set_bytes: int
    #: Work to make every set from the images, and from the sets of the boundary before.
    make_from_images: float
    make_from_previous: float
    #: Work of the prefix over all epochs of all stages that read this boundary, when nothing is stored.
    recompute: float
    #: Work of reading the sets as often as they are read.
    read: float = 0
    in_seconds: bool = False


@dataclass(frozen=True)
class Decision:
    source: Source
    reason: str


def decide(
    boundaries: Sequence[BoundaryPrice], mode: Mode, budget: int | None, *, keep: bool = False
) -> tuple[Decision, ...]:
    """One decision a boundary, in order. `budget` is this regime's share in bytes, None for no limit; `keep`:
    sets are not released, so all of them are alive at once. Raises ConfigError when `always` cannot fit."""
    if mode == "never":
        return tuple(Decision("recompute", "snapshots.mode is never") for _ in boundaries)
    if mode == "always":
        peak = peak_bytes([boundary.set_bytes for boundary in boundaries], keep=keep)
        if budget is not None and peak > budget:
            raise ConfigError(
                f"snapshots need {human_bytes(peak)} at one time, the budget allows {human_bytes(budget)} "
                f"({peak} > {budget} bytes); raise snapshots.budget, lower data.views or use mode auto"
            )
        return tuple(
            Decision("snapshots", f"snapshots.mode is always; {_saving(boundary, index > 0)}")
            for index, boundary in enumerate(boundaries)
        )
    stored = _cheapest(boundaries, budget, keep)
    return tuple(
        Decision("snapshots", _saving(boundary, index - 1 in stored))
        if index in stored
        else _not_stored(boundaries, index, stored, budget)
        for index, boundary in enumerate(boundaries)
    )


def peak_bytes(set_bytes: Sequence[int], *, keep: bool = False) -> int:
    """Most bytes alive at one time: while a boundary is rolled forward, it and the next one are."""
    if keep:
        return sum(set_bytes)
    pairs = [first + second for first, second in pairwise(set_bytes)]
    return max([*pairs, *set_bytes], default=0)


def _cheapest(boundaries: Sequence[BoundaryPrice], budget: int | None, keep: bool) -> frozenset[int]:
    """Least work over all combinations. Only neighbours interact, so one pass with two states is exact when
    sets are released; when they are kept, the largest go first until the sum fits."""
    if keep:
        chosen = set(_cheapest(boundaries, None, False))
        while budget is not None and sum(boundaries[index].set_bytes for index in chosen) > budget:
            chosen.remove(max(chosen, key=lambda index: boundaries[index].set_bytes))
        return frozenset(chosen)

    Option = tuple[float, int, frozenset[int]]  # work, bytes stored at the last boundary, chosen
    plain: Option = (0, 0, frozenset())
    stored: Option | None = None
    for index, boundary in enumerate(boundaries):
        before = [plain] if stored is None else [plain, stored]
        best = min(before, key=lambda option: option[0])
        candidates: list[Option] = []
        if budget is None or boundary.set_bytes <= budget:
            work = plain[0] + boundary.make_from_images + boundary.read
            candidates.append((work, boundary.set_bytes, plain[2] | {index}))
        if stored is not None and (budget is None or stored[1] + boundary.set_bytes <= budget):
            work = stored[0] + boundary.make_from_previous + boundary.read
            candidates.append((work, boundary.set_bytes, stored[2] | {index}))
        stored = min(candidates, key=lambda option: option[0], default=None)
        plain = (best[0] + boundary.recompute, 0, best[2])
    if stored is not None and stored[0] < plain[0]:
        return stored[2]
    return plain[2]


def _saving(boundary: BoundaryPrice, rolled: bool) -> str:
    made = boundary.make_from_previous if rolled else boundary.make_from_images
    if boundary.in_seconds:
        reading = f"{seconds_text(made)} to make and {seconds_text(boundary.read)} to read"
        if made + boundary.read < boundary.recompute:
            return f"{reading} against {seconds_text(boundary.recompute)} to recompute"
        return f"{reading}: saves nothing here, but lets the next boundary be rolled forward"
    saved = 1 - made / boundary.recompute if boundary.recompute else 0.0
    if saved <= 0:
        return "saves nothing here, but lets the next boundary be rolled forward"
    return f"saves {saved:.1%} of the prefix's forward work"


def _not_stored(
    boundaries: Sequence[BoundaryPrice], index: int, stored: frozenset[int], budget: int | None
) -> Decision:
    boundary = boundaries[index]
    needed = boundary.set_bytes + (boundaries[index - 1].set_bytes if index - 1 in stored else 0)
    if budget is not None and needed > budget:
        return Decision(
            "recompute",
            f"{human_bytes(needed)} of snapshots exceed this regime's budget of {human_bytes(budget)}",
        )
    if boundary.in_seconds:
        made = boundary.make_from_previous if index - 1 in stored else boundary.make_from_images
        snapshots = f"{seconds_text(made)} to make and {seconds_text(boundary.read)} to read snapshots"
        return Decision("recompute", f"{seconds_text(boundary.recompute)} against {snapshots}")
    return Decision("recompute", "reading snapshots would save no forward work")
