"""What trained a part: every stage that changed it, in order, and no other."""

from __future__ import annotations

from pathlib import Path

from planning import small_plan

from orchestrator.exports.lineage import trainings


def test_a_part_was_trained_by_every_stage_that_had_it_in_order(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"regimes": ["segprop"]})
    regime = plan.regimes["segprop"]
    assert trainings(plan, regime.weights["head"], "head") == list(regime.stages)
    first = plan.node(regime.stages[0]).task["trained"][0]
    assert trainings(plan, regime.weights[first], first) == [regime.stages[0]]
    assert trainings(plan, regime.stages[1], "head") == list(regime.stages[:2])


def test_replicas_that_were_averaged_all_count(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"regimes": ["segprop"], "pipeline": "wavefront", "wavefront.rounds": 2})
    regime = plan.regimes["segprop"]
    found = trainings(plan, regime.weights["head"], "head")
    assert set(found) == {node for stage in regime.stages for node in regime.work_of(stage)}
    assert found == [node.id for node in plan.nodes if node.id in found]
