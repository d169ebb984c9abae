"""Model cards say what a run was, in metadata that the hub reads and text that shows users' names and obeys none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import make_plan, make_summary
from huggingface_hub import ModelCard
from summaries import read

from orchestrator.exports.card import Exported, card, plain
from orchestrator.plan.graph import Plan
from orchestrator.reports.records import About, Summary
from workers.specs.as_json import from_json
from workers.specs.experiment import Experiment

HOSTILE = "<script>alert(1)</script> | [x](javascript:0) `*_\n---\n# big"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    found = read(make_summary(tmp_path_factory.mktemp("summary")))
    return replace(found, about=About("resnet18", "digits", 7, "e2e", source="quickstart.yaml"))


def made(summary: Summary, plan: Plan, regime: str = "segprop", stage: str | None = None, *files: str) -> str:
    experiment = from_json(Experiment, plan.node(plan.regimes[regime].stages[0]).task["experiment"])
    return card(summary, plan, experiment, Exported(regime, stage, False, frozenset(files)))


def started_from(plan: Plan, path: str, data: str | None = None) -> Plan:
    """The same plan, as of a model and data with these paths."""

    def changed(node: Any) -> Any:
        if node.initializes:
            return replace(node, task={**node.task, "model": {**node.task["model"], "path": path}})
        if node.prepares:
            return replace(node, task={**node.task, "data": {**node.task["data"], "path": data}})
        return node

    return replace(plan, nodes=tuple(map(changed, plan.nodes)))


def test_a_card_says_regime_data_settings_scores_seed_version_and_command(plan: Plan, summary: Summary) -> None:
    text = made(summary, plan, "segprop", None, "load_model.py")
    regime = summary.regimes["segprop"]
    digest = next(node.task["fingerprint"] for node in plan.nodes if node.prepares)
    accuracy = regime.final.metrics["accuracy"]
    assert accuracy is not None
    for words in (
        "| Data | digits |",
        f"`{digest}`",
        "| Regime | segprop (segprop) |",
        f"{sum(stage.epochs for stage in regime.stages)} epochs",
        "| Seed | 7 |",
        "segprop 0.1.0",
        "`segprop run quickstart.yaml`",
        f"| this model | test | {regime.final.metrics['loss']:.4f} | {100 * accuracy:.2f} % |",
        "| regime e2e | test |",
        'runpy.run_path(f"{FOLDER}/load_model.py")',
    ):
        assert words in text, words
    found = ModelCard(text).data.to_dict()
    assert found == {"library_name": "pytorch", "pipeline_tag": "image-classification", "tags": ["segprop"]}
    assert made(summary, plan, "segprop", None, "load_model.py") == text


def test_a_card_of_a_stage_has_the_scores_of_that_stage(plan: Plan, summary: Summary) -> None:
    stage = summary.regimes["segprop"].stages[0]
    text = made(summary, plan, "segprop", stage.name)
    assert f"As it was after the stage {plain(stage.name)}." in text
    assert f"| this model | validation | {stage.assembled['loss']:.4f} |" in text
    assert "| test |" not in text
    assert "| Training | 1 stage, " in text


def test_names_on_the_hub_are_metadata_and_places_of_this_machine_are_not(
    plan: Plan, summary: Summary, tmp_path: Path
) -> None:
    on_hub = made(summary, started_from(plan, "org/base-1.5", "org/chats"))
    assert ModelCard(on_hub).data.base_model == "org/base-1.5"
    assert ModelCard(on_hub).data.datasets == ["org/chats"]
    here = made(summary, started_from(plan, str(tmp_path), str(tmp_path / "chats.jsonl")))
    assert ModelCard(here).data.base_model is None
    assert f"a local folder, `{tmp_path.name}`" in here
    assert str(tmp_path.parent) not in here


def test_what_users_named_is_shown_and_means_nothing(plan: Plan, summary: Summary) -> None:
    hostile = replace(
        summary,
        run=HOSTILE,
        about=About(HOSTILE, HOSTILE, 0, None, source=HOSTILE),
        regimes={HOSTILE: summary.regimes["segprop"], **summary.regimes},
    )
    text = made(hostile, started_from(plan, f"{HOSTILE}/x", HOSTILE))
    assert "\n# big" not in text
    head, body = text.split("\n---\n", 1)
    assert set(yaml.safe_load(head)) == {"library_name", "pipeline_tag", "tags"}
    outside_of_code = "".join(body.replace("\\`", "").split("`")[::2])
    assert "<script" not in outside_of_code.replace("\\<", "")
    assert "](javascript" not in outside_of_code.replace("\\]", "")
    columns = {line.replace("\\|", "").count("|") for line in body.splitlines() if line.startswith("| Data")}
    assert columns == {3}
