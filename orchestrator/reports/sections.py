"""What the summary says of diagnoses: one row for each question of `orchestrator.plan.after_stage` that is not a score.

`assembled` and `truncated` are figures of a stage and stand there. Any other question has its section in its regime's
summary, under `diagnoses`: stage -> what the row makes of the answering node's result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.plan.graph import RegimePlan

#: Result of the node that answers a question -> JSON value of its section.
SECTIONS: dict[str, Callable[[Mapping[str, Any]], Any]] = {}


def diagnoses(
    regime: RegimePlan, stage_name: Callable[[str], str], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return question -> stage -> section, of nodes that have a result. `stage_name`: of a train node."""
    return {
        question: {
            stage_name(stage): SECTIONS[question](results[node]) for stage, node in asked.items() if node in results
        }
        for question, asked in regime.diagnoses.items()
        if question in SECTIONS
    }
