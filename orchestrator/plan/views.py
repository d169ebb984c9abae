"""Decide how many augmented views of every sample a stage sees, where `data.views` is `auto`. Pure.

A stage that computes from the raw inputs sees a view an epoch: it augments in every epoch anyway. A stored boundary has
a set of every view, so it has as many as the budget allows. All stored boundaries of a regime have the same views,
since each is rolled forward from the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

#: What a configuration asks for: so many, `auto`, or None where samples have no views.
Asked = int | Literal["auto"] | None

#: Views of a stored boundary, at least (where it has as many epochs): whoever stores less gives up accuracy.
LEAST = 4
#: Snapshot bytes of a regime up to which it takes more than the least views where no budget is set.
WITHOUT_BUDGET = 16 << 30


def stored_views(epochs: int, peak_bytes: Callable[[int], int], budget: int | None) -> int:
    """Return how many views stored boundaries have, from `LEAST` to `epochs`, the most that a stage needs.

    `peak_bytes`: views -> snapshot bytes alive at one time, never less for more views. `budget`: bytes for this regime,
    None: not set."""
    allowed = WITHOUT_BUDGET if budget is None else budget
    low, high = min(LEAST, epochs), max(1, epochs)
    while low < high:
        middle = (low + high + 1) // 2
        if peak_bytes(middle) <= allowed:
            low = middle
        else:
            high = middle - 1
    return max(1, low)


def views_to_give(asked: Asked, stored: int, source: str, epochs: int) -> int | None:
    """Return how many views a stage of `epochs` is told to see; None: what its data section says. `stored`: those of
    stored boundaries; `source`: `images`, `snapshots` or `recompute`."""
    if asked != "auto":
        return None
    return min(stored, epochs) if source == "snapshots" else epochs


@dataclass(frozen=True)
class ViewsSeen:
    """Views of every sample that a stage sees, and the epochs in which it does."""

    views: int
    epochs: int


def unequal_views(seen: Mapping[str, Iterable[ViewsSeen]]) -> Iterator[str]:
    """Name, in a sentence each, the regimes with a stage that sees fewer views than it has epochs, while another regime
    sees more in each of its stages. `seen`: regime -> its stages, none where samples have no views."""
    fewest = {
        name: min(stages, key=lambda stage: (stage.views, -stage.epochs))
        for name, stages in ((name, tuple(stages)) for name, stages in seen.items())
        if stages
    }
    for name, stage in fewest.items():
        more = [f"{other} {least.views}" for other, least in fewest.items() if least.views > stage.views]
        if stage.views < stage.epochs and more:
            yield (
                f"{name} sees {stage.views} view{'s' if stage.views != 1 else ''} of a sample in {stage.epochs} epochs "
                f"({', '.join(more)}): few views cost accuracy, so the comparison is not on equal terms; raise "
                "snapshots.budget, set snapshots.mode=never, or give all regimes the same data.views"
            )
