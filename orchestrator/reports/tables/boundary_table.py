"""What boundaries know (`evaluation.boundaries`) as rows of texts: a row for each boundary that was measured after a
stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.reports.records import RegimeSummary, Summary
from orchestrator.reports.sections import BoundariesSection, BoundarySection, boundaries_of
from orchestrator.units import DASH

#: Figure -> what its column is called, and the factor and the digits it is written with.
FIGURES: Mapping[str, tuple[str, float, int]] = {
    "nhsic_inputs": ("nHSIC with inputs", 1.0, 2),
    "nhsic_targets": ("nHSIC with targets", 1.0, 3),
    "cka": ("CKA with end-to-end", 1.0, 3),
    "probe": ("linear probe, %", 100.0, 2),
    "effective_rank": ("effective rank", 1.0, 1),
}


@dataclass(frozen=True)
class BoundaryRow:
    """One boundary after one stage. `first`: of its regime; `cells`: a text for each of `BoundaryTable.heads`."""

    regime: str
    first: bool
    stage: str
    boundary: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class BoundaryTable:
    """`figures`: the names of those that are there; `heads` what their columns are called; `notes`: sentences."""

    figures: tuple[str, ...]
    rows: tuple[BoundaryRow, ...]
    notes: tuple[str, ...]

    @property
    def heads(self) -> list[str]:
        return [FIGURES[name][0] for name in self.figures]


def boundary_table(summary: Summary) -> BoundaryTable | None:
    """Return the table of a run; None where nothing was measured."""
    regimes = {name: found for name, regime in summary.regimes.items() if (found := boundaries_of(regime))}
    sections = [section for found in regimes.values() for section in found.values()]
    if not sections:
        return None
    there = {name for section in sections for item in section.boundaries.values() for name in item.measures}
    figures = tuple(name for name in FIGURES if name in there)
    rows = tuple(row for name, found in regimes.items() for row in _rows(name, found, figures))
    return BoundaryTable(figures, rows, (_samples(sections), _reading(sections), *_shares(summary, regimes)))


def _rows(regime: str, found: Mapping[str, BoundariesSection], figures: Sequence[str]) -> Iterator[BoundaryRow]:
    first = True
    for stage, section in found.items():
        for boundary, item in section.boundaries.items():
            yield BoundaryRow(regime, first, stage, boundary, tuple(_cell(item, name) for name in figures))
            first = False


def _cell(item: BoundarySection, name: str) -> str:
    found, (_, factor, digits) = item.measures.get(name), FIGURES[name]
    return DASH if found is None else f"{factor * found.value:.{digits}f} ± {factor * found.error:.{digits}f}"


def _samples(sections: Sequence[BoundariesSection]) -> str:
    one = sections[0]
    probes = f"; probes are scored on {one.held_out:,} validation samples" if one.held_out else ""
    return (
        f"Value ± standard error, of {one.samples:,} training samples in blocks of {one.block:,}{probes}. nHSIC with "
        f"targets of {one.classes} classes is at most {one.classes - 1}."
    )


def _reading(sections: Sequence[BoundariesSection]) -> str:
    read, ran = (sum(getattr(section, name) for section in sections) for name in ("read", "ran"))
    return f"{read:,} samples were read from snapshots, {ran:,} went through the network from its first block on."


def _shares(summary: Summary, regimes: Mapping[str, Mapping[str, BoundariesSection]]) -> Iterator[str]:
    """Say how measuring compares with training, where both times are known."""
    measured = sum(section.seconds for found in regimes.values() for section in found.values())
    trained = sum(_stage_seconds(summary.regimes[name], found) for name, found in regimes.items())
    if trained:
        yield f"Measuring took {100 * measured / trained:.1f} % of the time of the stages."


def _stage_seconds(regime: RegimeSummary, measured: Mapping[str, BoundariesSection]) -> float:
    return sum(stage.seconds or 0.0 for stage in regime.stages if stage.name in measured)
