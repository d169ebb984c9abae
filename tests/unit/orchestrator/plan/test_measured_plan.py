"""What boundaries know in a plan: which are measured when, from what, and that nothing else changes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes, write_checkpoint
from planning import small_config, small_plan
from running import write_config

from cache_store.errors import ConfigError
from orchestrator.execution.ready_queue import ReadyQueue
from orchestrator.plan.graph import Node, Plan
from orchestrator.runs.prepare import prepare

ASKED: dict[str, Any] = {"evaluation.boundaries": {}, "regimes": ["lw", "e2e", "segprop"], "snapshots.mode": "always"}


def measured(plan: Plan) -> dict[str, Node]:
    return {node.label: node for node in plan.nodes if node.kind == "boundaries"}


def behind(plan: Plan) -> dict[str, list[str]]:
    return {label: node.task["boundaries"] for label, node in measured(plan).items()}


def test_boundaries_are_measured_that_a_stage_changed(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, ASKED)
    stages = ("stage1-seg1", "stage2-seg2", "stage3-seg3", "stage4-seg4")
    every = ["seg1", "seg2", "seg3", "seg4"]
    assert behind(plan) == {
        "e2e/boundaries after e2e": every,
        **{f"lw/boundaries after {name}": every[number:] for number, name in enumerate(stages)},
        **{f"segprop/boundaries after {name}": every[n:] for n, name in enumerate(("stage1-base", *stages[1:]))},
    }
    # LW's last stage trains the head alone, behind all boundaries.
    assert "lw/head" in {node.label for node in plan.nodes}
    for regime in plan.regimes.values():
        for stage, node_id in regime.diagnoses["boundaries"].items():
            node = plan.node(node_id)
            assert node_id in plan.targets
            scored = plan.node(regime.assembled[stage]).parents
            weights = {role: parent for role, parent in node.parents.items() if role.startswith("weights/")}
            assert weights.items() <= scored.items()
            assert "weights/head" not in weights


def test_measuring_starts_at_the_nearest_boundary_that_a_stage_reads(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, ASKED)
    regime = plan.regimes["segprop"]
    read = [plan.node(stage).task["boundary"] for stage in regime.stages]
    nodes = [plan.node(regime.diagnoses["boundaries"][stage]) for stage in regime.stages]
    # What the next stage reads is the first that changed; behind the last stage nothing is stored.
    assert [node.task.get("stored") for node in nodes] == [*read[1:], read[-1]]
    assert "stored" not in measured(plan)["e2e/boundaries after e2e"].task
    computed = small_plan(tmp_path, {**ASKED, "snapshots.mode": "never"})
    assert not any("stored" in node.task for node in measured(computed).values())
    # Sets are not kept for it: they are no parents.
    assert not any(role.startswith("snapshot/") for node in measured(plan).values() for role in node.parents)


def test_others_are_compared_with_the_end_to_end_regime_wherever_it_stands(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, ASKED)
    nodes = measured(plan)
    reference = nodes.pop("e2e/boundaries after e2e")
    assert (reference.task["keeps"], "reference" in reference.parents) == (True, False)
    assert {node.parents["reference"] for node in nodes.values()} == {reference.id}
    assert list(plan.regimes) == ["lw", "e2e", "segprop"]
    alone = measured(small_plan(tmp_path, {**ASKED, "regimes": ["lw", "segprop"]}))
    other = measured(small_plan(tmp_path, {**ASKED, "evaluation.boundaries": {"measures": ["probe"]}}))
    chosen = measured(small_plan(tmp_path, {**ASKED, "evaluation.yardstick": "segprop"}))
    for found in (alone, other, chosen):
        assert not any("keeps" in node.task or "reference" in node.parents for node in found.values())


def test_what_each_regime_comes_to_is_all_that_is_measured_where_that_is_asked_for(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**ASKED, "evaluation.boundaries": {"of": "final"}})
    every = ["seg1", "seg2", "seg3", "seg4"]
    assert behind(plan) == {
        "e2e/boundaries after e2e": every,
        "lw/boundaries after head": every,
        "segprop/boundaries after stage4-seg4": every,
    }


def test_nothing_else_changes_by_it(tmp_path: Path) -> None:
    """Every other node is the same: a finished run that is given the section trains nothing."""
    plain = small_plan(tmp_path, {"regimes": ["lw", "e2e", "segprop"], "snapshots.mode": "always"})
    asked = small_plan(tmp_path, ASKED)
    assert {node.id for node in asked.nodes if node.kind != "boundaries"} == {node.id for node in plain.nodes}
    assert not measured(plain)
    assert not any(regime.diagnoses for regime in plain.regimes.values())
    for name, regime in plain.regimes.items():
        assert regime.decisions == asked.regimes[name].decisions


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"evaluation.boundaries": {"samples": 500}}, False),
        ({"evaluation.boundaries": {"measures": ["nhsic", "cka"]}}, False),
        ({"evaluation.boundaries": {"bandwidth": "median"}}, False),
        ({"evaluation.boundaries": {"bandwidth": "fixed"}}, True),
        ({"training.optimizer.lr": 0.5}, False),
        ({"evaluation.stages": False}, True),
        ({"snapshots.retention": "keep"}, True),
    ],
)
def test_figures_are_known_by_weights_settings_and_data(tmp_path: Path, change: dict[str, Any], same: bool) -> None:
    before, after = (measured(small_plan(tmp_path, {**ASKED, **changes})) for changes in ({}, change))
    assert all((before[label].id == after[label].id) is same for label in before)


def test_measuring_waits_until_nothing_else_is_ready(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, ASKED)
    committed = {node.id for node in plan.nodes if node.kind in ("data", "model", "train", "materialize")}
    ready = [plan.node(node_id).kind for node_id in ReadyQueue(plan, committed=committed).ready()]
    assert ready == sorted(ready, key=["evaluate", "boundaries"].index)
    assert {"evaluate", "boundaries"} == set(ready)


def test_the_plan_predicts_it(tmp_path: Path) -> None:
    few, many = (
        measured(small_plan(tmp_path, {**ASKED, "evaluation.boundaries": {"samples": count}}))
        for count in (100, 10_000)
    )
    for label in few:
        assert 0 < few[label].estimate.seconds < many[label].estimate.seconds
    # Nothing of validation goes through the network where no probe asks for it.
    unprobed = measured(small_plan(tmp_path, {**ASKED, "evaluation.boundaries": {"measures": ["nhsic"]}}))
    assert all(unprobed[label].estimate.flops < many[label].estimate.flops for label in many)


def test_language_models_are_refused_and_so_are_too_few_samples(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    changes = {
        **lm_changes(tmp_path),
        "model": {"family": "causal_lm", "path": str(tmp_path / "model")},
        "evaluation": {"boundaries": {}},
    }
    with pytest.raises(ConfigError, match=r"evaluation.boundaries: is for images with classes.*allowed here: null"):
        prepare(write_config(tmp_path / "configs", changes))
    with pytest.raises(ConfigError, match=r"evaluation\.boundaries\.samples"):
        small_config(tmp_path, {"evaluation.boundaries": {"samples": 63}})
    with pytest.raises(ConfigError, match=r"evaluation\.boundaries: 40 training samples are too few .* at least 64"):
        prepare(write_config(tmp_path / "few", {"data.train_limit": 40, "evaluation.boundaries": {}}))


def test_stages_that_overlap_are_measured_as_they_end(tmp_path: Path) -> None:
    wave = {**ASKED, "regimes": ["segprop"], "pipeline": "wavefront"}
    plan = small_plan(tmp_path, wave)
    regime = plan.regimes["segprop"]
    found = regime.diagnoses["boundaries"]
    assert list(found) == [stage for stage in regime.stages if stage in found]
    assert {block for node_id in found.values() for block in plan.node(node_id).task["boundaries"]} == {
        *("seg1", "seg2", "seg3", "seg4")
    }
    for stage, node_id in found.items():
        weights = plan.node(regime.assembled[stage]).parents.items()
        assert {item for item in plan.node(node_id).parents.items() if item[0].startswith("weights/")} <= weights
