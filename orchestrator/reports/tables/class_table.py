"""Put how single classes fared into rows: the share of each that every regime told right, and what it took it for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.reports.records import ClassCounts, Summary
from orchestrator.units import DASH, percent_text

#: Classes that are shown, the worst ones where there are more.
MOST_ROWS = 30


@dataclass(frozen=True)
class ClassCell:
    """What a regime made of a class. `share`: told right, 0..1; None where there are no samples."""

    text: str
    share: float | None
    #: What it was taken for most often: `cat (12×)`.
    taken_for: str


@dataclass(frozen=True)
class ClassRow:
    name: str
    samples: int
    #: By regime, in the order of the table.
    cells: tuple[ClassCell, ...]


@dataclass(frozen=True)
class ClassTable:
    """`regimes`: names of those that classes were counted of. `left_out`: classes that are not shown."""

    regimes: tuple[str, ...]
    rows: tuple[ClassRow, ...]
    left_out: int


def class_table(summary: Summary) -> ClassTable:
    """Return the rows of a run's final scores: all classes in their order, or the worst ones, worst first."""
    counted = {name: regime.final.by_class for name, regime in summary.regimes.items()}
    known = {name: found for name, found in counted.items() if found is not None}
    if not known:
        return ClassTable((), (), 0)
    names = _names(summary, len(next(iter(known.values())).samples))
    # Regimes of one run score the same split.
    rows = [_row(place, names, known) for place in range(len(names))]
    shown = rows if len(rows) <= MOST_ROWS else sorted(rows, key=_mean_share)[:MOST_ROWS]
    return ClassTable(tuple(known), tuple(shown), len(rows) - len(shown))


def _names(summary: Summary, count: int) -> Sequence[str]:
    known = (summary.about.class_names if summary.about is not None else None) or ()
    return known if len(known) == count else [str(number) for number in range(count)]


def _row(place: int, names: Sequence[str], known: Mapping[str, ClassCounts]) -> ClassRow:
    samples = next(iter(known.values())).samples[place]
    return ClassRow(names[place], samples, tuple(_cell(place, names, counts) for counts in known.values()))


def _cell(place: int, names: Sequence[str], counts: ClassCounts) -> ClassCell:
    samples = counts.samples[place]
    if not samples:
        return ClassCell(DASH, None, "")
    share = counts.right[place] / samples
    taken = next((pair for pair in counts.confused if pair[0] == place), None)
    return ClassCell(percent_text(share), share, "" if taken is None else f"{names[taken[1]]} ({taken[2]:,}×)")


def _mean_share(row: ClassRow) -> float:
    shares = [cell.share for cell in row.cells if cell.share is not None]
    return sum(shares) / len(shares) if shares else 1.0
