"""What the summary says of diagnoses: one row for each question of `orchestrator.plan.after_stage` that is not a score.

`assembled` and `truncated` are figures of a stage and stand there. Any other question has its section in its regime's
summary, under `diagnoses`: stage -> what the row makes of the answering node's commit, which it reads as the type that
its kind of node commits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cache_store.records.nodes import Commit
from orchestrator.plan.graph import RegimePlan
from orchestrator.reports.record_json import from_json, to_json
from orchestrator.reports.records import RegimeSummary
from workers.specs.results import BoundariesResult

BOUNDARIES = "boundaries"


@dataclass(frozen=True)
class Measured:
    """A figure and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class BoundarySection:
    """What a boundary knows, by the name of the figure; `width`: numbers that stand for a sample there."""

    width: int
    measures: Mapping[str, Measured]


@dataclass(frozen=True)
class BoundariesSection:
    """What was measured after a stage, by the block before each boundary: those that the stage left as they were are
    not among them. `samples` in blocks of `block`, probes scored on `held_out`; of both, `read` came from snapshots,
    and `ran` went through all blocks. `seconds`: in all; `forward_seconds`: without the estimates."""

    samples: int
    held_out: int
    block: int
    classes: int
    boundaries: Mapping[str, BoundarySection]
    read: int
    ran: int
    forward_seconds: float
    seconds: float


def _boundaries(commit: Commit) -> Any:
    found = commit.read(BoundariesResult).to_json()
    return to_json(from_json(BoundariesSection, {key: found[key] for key in BoundariesSection.__dataclass_fields__}))


def boundaries_of(regime: RegimeSummary) -> dict[str, BoundariesSection]:
    """Return stage -> what was measured of boundaries after it, in order; {} where nothing was."""
    found = (regime.diagnoses or {}).get(BOUNDARIES, {})
    return {
        stage: from_json(BoundariesSection, section, f"boundaries after {stage}") for stage, section in found.items()
    }


def known_after(sections: Mapping[str, BoundariesSection]) -> dict[str, dict[str, BoundarySection]]:
    """Return stage -> what every boundary knows after it, measured then or before, in chain order."""
    known: dict[str, BoundarySection] = {}
    found = {}
    for stage, section in sections.items():
        known = {**known, **section.boundaries}
        found[stage] = known
    return found


#: Commit of the node that answers a question -> JSON value of its section.
SECTIONS: dict[str, Callable[[Commit], Any]] = {BOUNDARIES: _boundaries}


def diagnoses(
    regime: RegimePlan, stage_name: Callable[[str], str], commits: Mapping[str, Commit]
) -> dict[str, dict[str, Any]]:
    """Return question -> stage -> section, of nodes that have a commit. `stage_name`: of a train node."""
    return {
        question: {
            stage_name(stage): SECTIONS[question](commits[node]) for stage, node in asked.items() if node in commits
        }
        for question, asked in regime.diagnoses.items()
        if question in SECTIONS
    }
