"""What the summary says of diagnoses: one row for each question of `orchestrator.plan.after_stage` that is not a score.

`assembled` and `truncated` are figures of a stage and stand there. Any other question has its section in its regime's
summary, under `diagnoses`: stage -> what the row makes of the answering node's commit, which it reads as the type that
its kind of node commits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cache_store.records.nodes import Commit
from orchestrator.plan.graph import RegimePlan

#: Commit of the node that answers a question -> JSON value of its section.
SECTIONS: dict[str, Callable[[Commit], Any]] = {}


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
