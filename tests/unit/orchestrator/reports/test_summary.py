"""`orchestrator.reports.summary`: DESIGN §8's shape, from a plan and whatever commits there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import ENVIRONMENT, TEXT_DATA, make_commits, make_plan, make_summary
from summaries import read

from orchestrator.plan.graph import Plan
from orchestrator.reports.record_json import to_json
from orchestrator.reports.summary import summarize, write_summary

STAGE_KEYS = {
    "name",
    "blocks",
    "seconds",
    "epochs",
    "trainable_parameters",
    "train_loss",
    "metrics",
    "peak_device_bytes",
    "peak_host_bytes",
    "snapshot",
    "reused",
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("plan"))


def summary_of(plan: Plan, commits: dict[str, Any], **options: Any) -> dict[str, Any]:
    options = {"status": "done", "environment": ENVIRONMENT, **options}
    return to_json(summarize("fake", plan, commits, **options))


def test_every_key_of_the_design_is_there(plan: Plan) -> None:
    summary = summary_of(plan, make_commits(plan), exports={"e2e": "model/e2e/model.safetensors"})
    assert {"run", "status", "environment", "regimes"} <= summary.keys()
    assert list(summary["regimes"]) == ["e2e", "lw", "segprop"]
    for regime in summary["regimes"].values():
        assert {"stages", "final", "seconds", "export"} <= regime.keys()
        assert 0 < regime["final"]["metrics"]["accuracy"] <= 1
        for stage in regime["stages"]:
            assert stage.keys() >= STAGE_KEYS
            assert set(stage["snapshot"]) == {"hits", "misses", "bytes_read", "bytes_written"}
    assert summary["regimes"]["e2e"]["export"] == "model/e2e/model.safetensors"
    assert summary["regimes"]["lw"]["export"] is None


def test_a_stage_reports_the_committed_epoch_not_the_last(plan: Plan) -> None:
    commits = make_commits(plan)
    node_id = plan.regimes["e2e"].stages[0]
    result = commits[node_id].result
    result["best_epoch"] = result["committed_epoch"] = 2
    stage = summary_of(plan, commits)["regimes"]["e2e"]["stages"][0]
    assert stage["train_loss"] == result["epochs"][2]["train_loss"]
    assert stage["metrics"]["validation_accuracy"] == result["epochs"][2]["validation_accuracy"]
    assert stage["epochs"] == len(stage["curve"]) == 8


def test_a_stage_says_what_rounding_took_and_others_say_nothing(plan: Plan) -> None:
    commits = make_commits(plan)
    first = plan.regimes["e2e"].stages[0]
    commits[first] = replace(commits[first], result={**commits[first].result, "swallowed": 0.25})
    regimes = summary_of(plan, commits)["regimes"]
    assert regimes["e2e"]["stages"][0]["swallowed"] == 0.25
    assert all("swallowed" not in stage for stage in regimes["segprop"]["stages"])


def test_the_data_are_summed_up_by_split_once_they_are_prepared(plan: Plan) -> None:
    commits = make_commits(plan)
    (data,) = [node.id for node in plan.nodes if node.prepares]
    assert "data" not in summary_of(plan, {})
    rows = {"train": 100, "test": 0, "held_out": 20}
    commits[data] = replace(commits[data], result={"rows": rows, "skipped": {".gif": 2}})
    assert summary_of(plan, commits)["data"] == {
        "unit": "images",
        "splits": {"train": {"samples": 80}, "validation": {"samples": 20}},
        "skipped": {".gif": 2},
        "warnings": [],
    }
    commits[data] = replace(commits[data], result=TEXT_DATA)
    found = summary_of(plan, commits)["data"]
    assert found["splits"]["train"] == {
        "samples": 240, "read": 260, "tokens": 22_320, "shortest": 16, "longest": 128, "mean": 93.2,
        "longest_read": 412, "cut": 30, "dropped": 0, "empty": 2, "without_targets": 18,
    }  # fmt: skip
    assert found["warnings"] == TEXT_DATA["warnings"]
    assert to_json(read(summary_of(plan, commits))) == summary_of(plan, commits)


def test_a_plan_without_any_commit_is_summarized_as_pending(plan: Plan) -> None:
    summary = summary_of(plan, {}, status="stopped")
    assert {regime["status"] for regime in summary["regimes"].values()} == {"pending"}
    assert summary["nodes"]["done"] == 0
    assert summary["regimes"]["segprop"]["final"]["metrics"] == {}
    assert summary["regimes"]["segprop"]["wall_seconds"] is None


def test_every_prefix_of_a_run_can_be_summarized(plan: Plan) -> None:
    commits = make_commits(plan)
    for count in range(len(plan.nodes) + 1):
        done = {node.id: commits[node.id] for node in plan.nodes[:count]}
        summary = summary_of(plan, done, status="stopped")
        json.dumps(summary, allow_nan=False)
        assert summary["nodes"]["done"] == count


def test_a_failed_node_marks_its_regime_and_no_other(plan: Plan) -> None:
    commits = make_commits(plan)
    bad = plan.regimes["segprop"].stages[2]
    del commits[bad]
    summary = summary_of(plan, commits, status="failed", failures={bad: "no space left"})
    assert summary["regimes"]["segprop"]["status"] == "failed"
    assert summary["regimes"]["segprop"]["stages"][2]["status"] == "failed"
    assert summary["regimes"]["lw"]["status"] == "done"
    assert summary["failures"] == [{"node": bad, "label": "segprop/stage3-seg3", "message": "no space left"}]


def test_reused_stages_say_so(plan: Plan) -> None:
    commits = make_commits(plan)
    summary = summary_of(plan, commits, reused=set(commits))
    assert all(stage["reused"] for regime in summary["regimes"].values() for stage in regime["stages"])
    assert summary["regimes"]["e2e"]["status"] == "reused"
    assert summary["nodes"]["reused"] == len(plan.nodes)


def test_training_time_is_stages_and_materialization_only(plan: Plan) -> None:
    commits = make_commits(plan)
    regime = summary_of(plan, commits)["regimes"]["segprop"]
    mine = [node for node in plan.nodes if "segprop" in node.regimes]
    expected = sum(commits[n.id].result["seconds"] for n in mine if n.kind in ("train", "materialize"))
    assert regime["seconds"] == pytest.approx(expected)
    assert regime["seconds_by_kind"]["evaluate"] > 0


def test_time_on_the_clock_leaves_out_the_pause_between_two_invocations(plan: Plan) -> None:
    commits = make_commits(plan)
    before = summary_of(plan, commits)["regimes"]["segprop"]["wall_seconds"]
    late = plan.regimes["segprop"].stages[-1]
    for node_id in (late, plan.regimes["segprop"].test, plan.regimes["segprop"].validation):
        where = commits[node_id].result["where"]
        where["started"] += 86400
        where["finished"] += 86400
    after = summary_of(plan, commits)["regimes"]["segprop"]["wall_seconds"]
    assert after == pytest.approx(before, abs=5)


def test_a_frozen_block_is_counted_once_per_sample_and_view(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, views=3)
    forwards = summary_of(plan, make_commits(plan))["regimes"]["segprop"]["forwards"]
    assert set(forwards) == {"seg1", "seg2", "seg3"}
    for counted in forwards.values():
        assert counted["sample_views"] == 3 * 1293 + 144
        assert counted["per_sample_view"] == 1.0


def test_a_recomputed_sample_shows_in_the_count(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    commits = make_commits(plan)
    commits[plan.regimes["segprop"].stages[1]].result["forwards"] = {"seg1": 1437}
    forwards = summary_of(plan, commits)["regimes"]["segprop"]["forwards"]
    assert forwards["seg1"]["per_sample_view"] == 2.0


def test_figures_that_are_not_finite_become_null(plan: Plan) -> None:
    commits = make_commits(plan)
    stage = plan.regimes["e2e"].stages[0]
    commits[stage].result["epochs"][0]["validation_loss"] = float("nan")
    summary = summary_of(plan, commits)
    assert summary["regimes"]["e2e"]["stages"][0]["curve"][0]["validation_loss"] is None


def test_summary_is_written_whole_and_read_back_equal(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)
    path = tmp_path / "run" / "summary.json"
    write_summary(path, read(summary))
    write_summary(path, read(summary))
    assert json.loads(path.read_text()) == summary
    assert [item.name for item in path.parent.iterdir()] == ["summary.json"]


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"run": "old"})
    with pytest.raises(ValueError, match="JSON"):
        write_summary(path, {"run": float("nan")})
    assert json.loads(path.read_text()) == {"run": "old"}
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]
