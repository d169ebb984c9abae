"""The run-wide exit: what it asks for, where it makes sense, and how a regime that ended early is told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_run import ENVIRONMENT, make_commits
from planning import small_config, small_plan

from cache_store.errors import ConfigError
from cache_store.records.nodes import Commit
from orchestrator.plan.graph import Plan
from orchestrator.reports.page import render
from orchestrator.reports.records import EndedEarly, Summary
from orchestrator.reports.summary import summarize
from workers.specs.results import EvaluateResult, Where
from workers.specs.tasks import GateSpec
from workers.tasks.gate import reached

FROZEN: dict[str, Any] = {"regimes": ["segprop"], "split.intermediate": "frozen"}
EXIT: dict[str, Any] = {**FROZEN, "run_exit": {"accuracy": 0.9}}


@pytest.mark.parametrize(
    ("gate", "met"),
    [
        (GateSpec(accuracy=0.9), True),
        (GateSpec(accuracy=0.91), False),
        (GateSpec(loss=0.5), True),
        (GateSpec(loss=0.49), False),
        (GateSpec(accuracy=0.9, loss=0.4), False),
        (None, False),
    ],
)
def test_everything_that_is_asked_for_must_be_reached(gate: GateSpec | None, met: bool) -> None:
    where = Where(host="h", pid=1, device="cpu", threads=1, started=0.0, finished=1.0)
    result = EvaluateResult(metrics={"accuracy": 0.9, "loss": 0.5}, rows=1, seconds=1.0, where=where)
    parents = {"gate": Commit("gate", "a1", {}, result.to_json())}
    assert reached(gate, parents) is met


def test_every_stage_but_the_first_and_its_snapshots_wait_for_the_score_before(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, EXIT)
    regime = plan.regimes["segprop"]
    first, *rest = regime.stages
    assert "gate" not in plan.node(first).parents
    for before, stage in zip(regime.stages, rest, strict=False):
        assert plan.node(stage).parents["gate"] == regime.assembled[before]
        assert plan.node(stage).task["gate"] == {"accuracy": 0.9, "loss": None}
        for node in regime.reads[stage]:
            assert plan.node(node).parents["gate"] == regime.assembled[before]


def test_without_it_nothing_is_asked_and_every_id_is_what_it_was(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, FROZEN)
    assert plan == small_plan(tmp_path, {**FROZEN, "run_exit": {"accuracy": None}})
    assert not any("gate" in node.task or "gate" in node.parents for node in plan.nodes)
    assert {node.id for node in plan.nodes}.isdisjoint(
        {node.id for node in small_plan(tmp_path, EXIT).nodes if "gate" in node.parents}
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "random blocks left out": (
        {"regimes": ["segprop"], "run_exit": {"accuracy": 0.9}},
        "run_exit: segprop starts from random weights and omits what is not trained yet",
    ),
    "another regime": (
        {"regimes": {"lw": {"run_exit": {"loss": 1.0}}}},
        "regimes.lw.run_exit: is for segprop, lw is lw; allowed here: leave it out",
    ),
    "a wave": ({**EXIT, "pipeline": "wavefront"}, "run_exit: not with pipeline wavefront (segprop)"),
    "stages that do not wait": ({**EXIT, "snapshots.production": "overlap"}, "overlap: not with run_exit (segprop)"),
    "no scores": ({**EXIT, "evaluation.stages": False}, "evaluation.stages: false: run_exit looks at"),
    "more than all": ({**FROZEN, "run_exit": {"accuracy": 1.5}}, "run_exit.accuracy: 1.5: must be less than or equal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        small_config(tmp_path, changes)
    assert message in str(caught.value)


def ended_after_two(plan: Plan) -> Summary:
    commits = make_commits(plan)
    regime = plan.regimes["segprop"]
    for node in regime.stages[2:]:
        commits[node].result.update({"exit": "run target", "epochs": [], "best_epoch": None, "committed_epoch": None})
    commits[regime.assembled[regime.stages[1]]].result["metrics"] = {"accuracy": 0.93, "loss": 0.2}
    return summarize("fake", plan, commits, status="done", environment=ENVIRONMENT)


def test_a_regime_that_ended_early_says_so_in_summary_and_report(tmp_path: Path) -> None:
    summary = ended_after_two(small_plan(tmp_path, EXIT))
    assert summary.regimes["segprop"].ended_early == EndedEarly(
        after="stage2-seg2", stages_left_out=2, target={"accuracy": 0.9}, reached={"accuracy": 0.93}
    )
    page = render(summary)
    assert "SegProp ended early: after stage2-seg2 the whole network had reached validation accuracy 93.00 %" in page
    assert "(asked for: 90.00 %), so the 2 stages after it were left out." in page
    plain = summarize("fake", plan := small_plan(tmp_path), make_commits(plan), status="done", environment=ENVIRONMENT)
    assert all(regime.ended_early is None for regime in plain.regimes.values())
    assert "ended early" not in render(plain)
