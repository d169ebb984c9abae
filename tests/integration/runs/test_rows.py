"""A regime, a runner and a diagnosis after each stage are one row of a table each: added here, and run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import row_examples
from row_examples import CountingThreads, NormResult, NormTask, answer_norm, ask_norm, head_alone
from running import final_digests, summary_of, write_config
from safetensors.torch import load_file

from cache_store.errors import ConfigError
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.config.resources import RUNNERS, RunnerKind
from orchestrator.plan.after_stage import QUESTIONS
from orchestrator.regimes.table import REGIMES, RegimeKind
from orchestrator.reports.sections import SECTIONS
from orchestrator.runs.prepare import prepare
from workers.specs.task_kinds import TASKS, TaskKind
from workers.tasks.execute import HANDLERS

SHORT: dict[str, Any] = {"training.epochs": 1, "data.train_limit": 48, "data.validation": 16, "data.test_limit": 32}


def run(config: Path) -> None:
    assert main(["run", str(config), "--quiet"]) == 0


def test_a_regime_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, {**SHORT, "regimes": ["head_only", "e2e"], "snapshots.mode": "always"})
    with pytest.raises(ConfigError, match=r"regimes\.head_only\.kind: is required; one of e2e, lw, segprop"):
        prepare(config)
    row = RegimeKind(layout=head_alone, title="Head alone", words="the head on the backbone as it comes")
    monkeypatch.setitem(REGIMES, "head_only", row)
    plan = prepare(config).plan
    (stage,) = plan.regimes["head_only"].stages
    assert plan.node(stage).task["trained"] == ["head"]
    assert plan.node(stage).task["source"] == "snapshots"
    run(config)
    regime = summary_of(tmp_path / "run")["regimes"]["head_only"]
    assert (regime["status"], regime["kind"], len(regime["stages"])) == ("done", "head_only", 1)
    assert regime["final"]["metrics"]["accuracy"] is not None
    # The backbone is the one it came with, the head is not.
    weights = plan.regimes["head_only"].weights
    (model,) = [node.id for node in plan.nodes if node.kind == "model"]
    assert {part for part, node in weights.items() if node != model} == {"head"}
    assert "head_only" in (tmp_path / "run" / "report.html").read_text()


def test_a_runner_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = write_config(tmp_path / "local", SHORT)
    run(local)
    threads = write_config(tmp_path / "threads", {**SHORT, "resources.runner": "threads"})
    with pytest.raises(ConfigError, match=r"resources\.runner: threads: must be 'ray' or 'local'"):
        prepare(threads)
    monkeypatch.setitem(RUNNERS, "threads", RunnerKind("row_examples:threads_runner"))
    monkeypatch.setattr(CountingThreads, "made", [])
    run(threads)
    (runner,) = CountingThreads.made
    plan = prepare(threads).plan
    assert sorted(order.node_id for order in runner.submitted) == sorted(node.id for node in plan.nodes)
    assert final_digests(prepare(threads)) == final_digests(prepare(local))


def test_every_runner_is_there_under_the_name_of_its_row() -> None:
    from orchestrator.runners import factory

    assert {name: row.factory for name, row in RUNNERS.items()} == {
        name: f"{factory.__name__}:{name}_runner" for name in ("ray", "local")
    }
    assert callable(factory.ray_runner)
    assert callable(factory.local_runner)
    assert callable(row_examples.threads_runner)


def test_a_diagnosis_after_each_stage_is_a_task_a_question_and_a_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, SHORT)
    before = prepare(config).plan
    monkeypatch.setitem(TASKS, "norm", TaskKind(spec=NormTask, scores=True))
    monkeypatch.setitem(HANDLERS, "norm", answer_norm)
    monkeypatch.setitem(QUESTIONS, "head_norm", ask_norm)
    monkeypatch.setitem(SECTIONS, "head_norm", lambda commit: commit.read(NormResult).norm)
    plan = prepare(config).plan
    # It adds a node a stage and changes none that was there.
    assert {node.id for node in plan.nodes if node.kind != "norm"} == {node.id for node in before.nodes}
    run(config)
    regime = plan.regimes["segprop"]
    found = summary_of(tmp_path / "run")["regimes"]["segprop"]["diagnoses"]
    nodes = NodeStore(open_storage(prepare(config).config.store))
    expected = {}
    for stage in regime.stages:
        commit: Any = nodes.commit_of(stage)
        state = load_file(tmp_path / "run" / "store" / commit.files["head.safetensors"].path)
        norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in state.values()))
        expected[plan.node(stage).task["name"]] = pytest.approx(norm, rel=1e-9)
    assert found == {"head_norm": expected}
    assert len(expected) == 4


def test_without_diagnoses_a_plan_and_a_summary_do_not_mention_them(tmp_path: Path) -> None:
    plan = prepare(write_config(tmp_path, SHORT)).plan
    assert all("diagnoses" not in regime.to_json() for regime in plan.regimes.values())


def test_every_kind_of_task_has_its_handler() -> None:
    assert HANDLERS.keys() == TASKS.keys()
