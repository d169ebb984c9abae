"""Stages as overlapping rounds: which there are, on whose weights they stand, and what becomes of them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_run import ENVIRONMENT, make_commits
from planning import CIFAR, small_config, small_plan

from cache_store.errors import ConfigError
from orchestrator.costs.formulas import Estimate
from orchestrator.execution.run_record import RunRecord
from orchestrator.plan import makespan
from orchestrator.plan.graph import Node, Plan
from orchestrator.regimes.stages import Cut, Stage
from orchestrator.regimes.table import layout
from orchestrator.regimes.wavefront import FINAL, Average, Round, StageEnd, Step, final_stage, steps
from orchestrator.reports.page import render
from orchestrator.reports.record_json import to_json
from orchestrator.reports.summary import summarize
from orchestrator.runs.dry_run import print_plan
from orchestrator.runs.prepare import prepare

BLOCKS = ("a", "b", "c", "d", "e")
WAVE = {"regimes": ["segprop"], "pipeline": "wavefront"}


def stages_of(*, head: int = 0, frozen: bool = False, train_base: bool = True) -> tuple[Stage, ...]:
    return layout(
        "segprop",
        BLOCKS,
        Cut(base=1, head=head, segment_size=1, frozen_intermediate=frozen, train_base=train_base),
    )


def wave(
    stages: tuple[Stage, ...], rounds: int = 3, average_every: int = 1, epochs: int = 6, final: bool = True
) -> tuple[Step, ...]:
    all_stages = (*stages, final_stage(stages)) if final else stages
    lengths = {stage.name: epochs for stage in all_stages}
    return steps(all_stages, lengths, rounds=rounds, average_every=average_every)


def rounds_in(found: tuple[Step, ...]) -> dict[tuple[str, int], Round]:
    return {
        (step.stage.name, step.index): step for step in found if isinstance(step, Round) and step.stage.group != FINAL
    }


CASES: list[Any] = [
    pytest.param(stages, rounds, every, id=f"{name}, {rounds} rounds, average every {every}")
    for name, stages in {
        "omit": stages_of(),
        "frozen": stages_of(frozen=True),
        "deep head": stages_of(head=2),
        "base as it comes": stages_of(train_base=False, frozen=True),
    }.items()
    for rounds, every in ((2, 1), (3, 2), (6, 1), (6, 4))
]


@pytest.mark.parametrize(("stages", "rounds", "every"), CASES)
def test_every_stage_has_all_its_rounds_and_each_needs_only_what_was_there_a_time_before(
    stages: tuple[Stage, ...], rounds: int, every: int
) -> None:
    found = wave(stages, rounds, every)
    assert set(rounds_in(found)) == {(stage.name, index) for stage in stages for index in range(rounds)}
    when = {step.key: step.time for step in found if not isinstance(step, StageEnd)}
    for step in found:
        if isinstance(step, Round):
            needed = {*step.weights.values(), step.continues, step.previous} - {None}
            assert all(when[str(key)] < step.time for key in needed), step.key
    ends = {step.stage.name: max(when[key] for key in step.rounds) for step in found if isinstance(step, StageEnd)}
    assert list(ends.values()) == sorted(ends.values())
    assert len(ends) == len(stages) + 1


@pytest.mark.parametrize(("stages", "rounds", "every"), CASES)
def test_a_round_reads_what_the_same_round_of_the_segments_before_it_left(
    stages: tuple[Stage, ...], rounds: int, every: int
) -> None:
    found = wave(stages, rounds, every)
    own = {stage.name: [part for part in stage.trained if part in BLOCKS[:5]] for stage in stages}
    of_block = {block: name for name, blocks in own.items() for block in blocks}
    shared = set.intersection(*(set(stage.trained) for stage in stages))
    for (name, index), step in rounds_in(found).items():
        for hop in step.stage.hops:
            for block in hop:
                if block in of_block and block not in shared:
                    before = rounds_in(found)[of_block[block], index]
                    assert step.weights[block] == before.key, (name, index, block)
    # So the last round of every stage, and the final pass, stand on the prefix as it ends.
    ended = next(step.weights for step in reversed(found) if isinstance(step, StageEnd))
    last = [step for (_, index), step in rounds_in(found).items() if index == rounds - 1]
    final = next(step for step in found if isinstance(step, Round) and step.key == FINAL)
    for step in (*last, final):
        for hop in step.stage.hops:
            assert {block: step.weights.get(block) for block in hop} == {block: ended.get(block) for block in hop}


def test_the_head_is_the_mean_of_the_replicas_and_before_there_is_one_that_of_the_stage_before() -> None:
    found = wave(stages_of(), rounds=3)
    rounds = rounds_in(found)
    averages = {step.time: step for step in found if isinstance(step, Average)}
    # One replica is no mean: at the first time only the base trains, at the last only the last segment.
    assert sorted(averages) == [1, 2, 3, 4, 5]
    assert averages[2].replicas == tuple(rounds[name, 2 - number].key for number, name in enumerate(NAMES[:3]))
    assert "head" not in rounds["stage1-base", 0].weights
    assert rounds["stage1-base", 1].weights["head"] == rounds["stage2-b", 0].weights["head"]
    assert rounds["stage2-b", 0].weights["head"] == rounds["stage1-base", 0].key
    assert {rounds[name, 3 - number].weights["head"] for number, name in list(enumerate(NAMES))[1:4]} == {
        averages[2].key
    }


NAMES = ["stage1-base", "stage2-b", "stage3-c", "stage4-d", "stage5-e"]


def test_between_averages_a_replica_goes_on_by_itself() -> None:
    rounds = rounds_in(found := wave(stages_of(), rounds=4, average_every=2))
    assert [step.time for step in found if isinstance(step, Average)] == [1, 3, 5]
    assert rounds["stage2-b", 2].time == 3
    assert rounds["stage2-b", 2].weights["head"] == rounds["stage2-b", 1].key
    assert rounds["stage2-b", 1].weights["head"] == "average 1"
    # A stage that starts between two averages takes the head of the stage before it.
    assert rounds["stage4-d", 0].weights["head"] == rounds["stage3-c", 0].key


def test_frozen_blocks_behind_a_segment_are_the_newest_there_are() -> None:
    rounds = rounds_in(wave(stages_of(frozen=True), rounds=4))
    first, late = rounds["stage2-b", 0], rounds["stage2-b", 3]
    assert {"c", "d", "e"} <= set(first.stage.path)
    assert not {"c", "d", "e"} & first.weights.keys()
    assert late.weights["c"] == rounds["stage3-c", 1].key
    assert late.weights["d"] == rounds["stage4-d", 0].key
    assert "e" not in late.weights


def test_epochs_are_shared_out_over_the_rounds() -> None:
    rounds = rounds_in(wave(stages_of(), rounds=4, epochs=10))
    assert [rounds["stage2-b", index].epochs for index in range(4)] == [(0, 2), (2, 5), (5, 7), (7, 10)]


def test_without_a_final_pass_the_last_round_is_the_end() -> None:
    found = wave(stages_of(), rounds=2, final=False)
    last = found[-1]
    assert isinstance(last, StageEnd)
    assert last.weights == {
        **{block: f"stage {number} round 1" for number, block in enumerate(BLOCKS)},
        "head": "stage 4 round 1",
    }


# -- the plan -------------------------------------------------------------------------------------------------


def ancestors(plan: Plan, node_id: str) -> set[str]:
    found: set[str] = set()
    stack = [node_id]
    while stack:
        for parent in plan.node(stack.pop()).parents.values():
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return found


def labelled(plan: Plan, label: str) -> Node:
    found = [node for node in plan.nodes if node.label == label]
    assert len(found) == 1, (label, [node.label for node in plan.nodes])
    return found[0]


def test_rounds_of_one_time_wait_for_nothing_of_each_other(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 8})
    together = [
        labelled(plan, f"segprop/{name} round {number}").id
        for name, number in (("stage1-base", 4), ("stage2-seg2", 3), ("stage3-seg3", 2), ("stage4-seg4", 1))
    ]
    assert plan.regimes["segprop"].width == plan.width == 4
    assert small_plan(tmp_path, {**WAVE, "training.epochs": 8, "wavefront.rounds": 8}).width == 4, "the end is no fifth"
    for node_id in together:
        assert not ancestors(plan, node_id) & set(together)


def test_a_boundary_is_rolled_forward_once_a_round_and_by_one_hop(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 8, "snapshots.mode": "always"})
    sets = [node for node in plan.nodes if node.kind == "materialize"]
    # Three boundaries, four rounds, two views and validation.
    assert len(sets) == 3 * 4 * 3
    deep = labelled(plan, "segprop/snapshot seg3 train view 1 round 2")
    assert plan.node(deep.parents["previous"]).label == "segprop/snapshot seg2 train view 1 round 2"
    assert plan.node(deep.parents["weights/seg1"]).label == "segprop/stage1-base round 2"
    assert plan.node(deep.parents["weights/seg3"]).label == "segprop/stage3-seg3 round 2"


def test_a_round_reads_the_views_of_its_own_epochs(tmp_path: Path) -> None:
    plan = small_plan(
        tmp_path, {**WAVE, "training.epochs": 8, "data.views": 4, "wavefront.rounds": 3, "snapshots.mode": "always"}
    )
    read = {
        number: sorted(
            role for role in labelled(plan, f"segprop/stage2-seg2 round {number}").parents if role.startswith("snap")
        )
        for number in (1, 2, 3)
    }
    # Epochs 0 and 1; 2, 3 and 4; 5, 6 and 7: views 0 and 1; 2, 3 and 0; 1, 2 and 3.
    assert read[1] == ["snapshot/train/0", "snapshot/train/1", "snapshot/validation/eval"]
    assert read[2] == ["snapshot/train/0", "snapshot/train/2", "snapshot/train/3", "snapshot/validation/eval"]
    assert read[3] == ["snapshot/train/1", "snapshot/train/2", "snapshot/train/3", "snapshot/validation/eval"]


def test_a_base_taken_as_it_comes_is_stored_once_for_all_rounds(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 8, "split.train_base": False, "split.base": 2})
    sets = [node.label for node in plan.nodes if node.kind == "materialize" and "seg2" in node.label]
    assert sorted(sets) == [
        "segprop/snapshot seg2 train view 0",
        "segprop/snapshot seg2 train view 1",
        "segprop/snapshot seg2 validation",
    ]


def test_the_order_of_the_plan_is_one_in_which_it_can_run(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 8})
    seen: set[str] = set()
    for node in plan.nodes:
        assert set(node.parents.values()) <= seen, node.label
        seen.add(node.id)
    assert len(seen) == len(plan.nodes)


def test_the_final_pass_is_trained_whole_and_the_rest_in_rounds_that_keep_their_last_epoch(tmp_path: Path) -> None:
    plan = small_plan(
        tmp_path,
        {**WAVE, "training.epochs": 8, "wavefront.final_epochs": 3, "regimes": {"segprop": {"stages": FINAL_LR}}},
    )
    final = labelled(plan, "segprop/final")
    assert final.task["train"]["epochs"] == 3
    assert final.task["train"]["optimizer"]["lr"] == 1e-5
    assert final.task["train"]["commit"] == "best"
    assert "round" not in final.task
    one = labelled(plan, "segprop/stage3-seg3 round 2")
    assert one.task["round"] == {"first": 2, "end": 4}
    assert one.task["train"]["epochs"] == 8, "its schedule is that of the whole stage"
    assert one.task["train"]["commit"] == "last"
    weights = plan.regimes["segprop"].weights
    assert {weights[part] for part in ("seg4", "head")} == {final.id}
    assert plan.node(weights["seg2"]).label == "segprop/stage2-seg2 round 4"


FINAL_LR = {"final": {"optimizer": {"lr": 1e-5}}}


def test_a_carried_optimizer_comes_from_the_round_that_ended_when_the_stage_begins(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 8, "training.head_optimizer": "carry"})
    first, second = (labelled(plan, f"segprop/stage3-seg3 round {number}") for number in (1, 2))
    assert plan.node(first.parents["optimizer"]).label == "segprop/stage2-seg2 round 1"
    assert "optimizer" not in second.parents
    assert second.parents["continue"] == first.id


def test_a_sequential_plan_is_what_it_was_before_there_were_rounds(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    assert plan == small_plan(tmp_path, {"pipeline": "sequential", "wavefront": {"rounds": 7}})
    trains = [node for node in plan.nodes if node.kind == "train"]
    assert not any("round" in node.task or "continue" in node.parents for node in trains)
    assert all(not regime.rounds and regime.width == 1 for regime in plan.regimes.values())


def test_both_ways_share_what_does_not_depend_on_them(tmp_path: Path) -> None:
    """One run, both pipelines: data, initial weights and nothing else, since even the first round's task differs."""
    regimes = {"plain": {"kind": "segprop"}, "wave": {"kind": "segprop", "pipeline": "wavefront"}}
    plan = small_plan(tmp_path, {"regimes": regimes, "training.epochs": 4})
    assert [node.label for node in plan.nodes if len(node.regimes) > 1] == ["data", "model"]
    assert not plan.regimes["plain"].rounds
    assert plan.regimes["wave"].rounds


def test_the_bytes_of_a_wave_are_those_of_all_boundaries_at_one_time(tmp_path: Path) -> None:
    changes = {"regimes": ["segprop"], "training.epochs": 8, "snapshots.mode": "always"}
    sequential = small_plan(tmp_path, changes)
    plan = small_plan(tmp_path, {**changes, **WAVE})
    sets: dict[str, int] = {}
    for node in plan.nodes:
        if node.kind == "materialize":
            sets[node.label.rsplit(" round ", 1)[-1]] = (
                sets.get(node.label.rsplit(" round ", 1)[-1], 0) + node.estimate.snapshot_bytes
            )
    one_version = sets["1"]
    assert plan.peak_snapshot_bytes == 2 * one_version
    assert plan.peak_snapshot_bytes > sequential.peak_snapshot_bytes


# -- the configuration ----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "on e2e": (
        {"regimes": {"e2e": {"pipeline": "wavefront"}, "segprop": {}}},
        ["regimes.e2e.pipeline: wavefront: is for segprop, e2e is e2e; allowed here: leave it out"],
    ),
    "on lw, by its settings": (
        {"regimes": {"lw": {"wavefront": {"rounds": 3}}}},
        ["regimes.lw.wavefront: wavefront: is for segprop, lw is lw; allowed here: leave it out"],
    ),
    "with no segprop": (
        {"regimes": ["e2e", "lw"], "pipeline": "wavefront"},
        ["pipeline: wavefront: is for segprop, and no regime here is one; allowed: sequential"],
    ),
    "more rounds than epochs": (
        {**WAVE, "wavefront.rounds": 9},
        ["wavefront.rounds: 9: more than the 4 epochs of stage1-base of segprop; allowed: 2 to 4"],
    ),
    "nothing to overlap": (
        {**WAVE, "split.base": 3, "split.head": 1},
        ["split.base: leaves segprop one stage, and pipeline wavefront nothing to overlap"],
    ),
    "exits": (
        {**WAVE, "training.exit": {"plateau": 2}},
        ["training.exit.plateau: 2: stage1-base of segprop runs in rounds of a fixed number of epochs"],
    ),
    "rounds that do not wait": (
        {**WAVE, "snapshots.production": "overlap"},
        ["snapshots.production: overlap: not with pipeline wavefront (segprop)"],
    ),
    "exits of a stage": (
        {"regimes": {"segprop": {"stages": {"segments": {"exit": {"steps": 9}}}}}, "pipeline": "wavefront"},
        ["regimes.segprop.stages.segments.exit.steps: 9: stage2-seg2 of segprop runs in rounds"],
    ),
    "unknown way": ({"pipeline": "diagonal"}, ["pipeline: ", "'sequential' or 'wavefront'"]),
    "one round": ({**WAVE, "wavefront.rounds": 1}, ["wavefront.rounds: 1: must be greater than or equal to 2"]),
    "never average": ({**WAVE, "wavefront.average_every": 0}, ["wavefront.average_every: 0: must be"]),
    "misspelt": ({**WAVE, "wavefront.round": 3}, ["wavefront.round: unknown key; did you mean rounds?"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_wave_is_refused(case: str, tmp_path: Path) -> None:
    changes, messages = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        small_config(tmp_path, changes)
    for message in messages:
        assert message in str(caught.value)


def test_pipeline_of_all_leaves_regimes_without_segments_alone_and_a_regime_may_differ(tmp_path: Path) -> None:
    regimes = {"e2e": {}, "segprop": {}, "plain": {"kind": "segprop", "pipeline": "sequential"}}
    config = small_config(tmp_path, {"regimes": regimes, "pipeline": "wavefront", "wavefront.rounds": 2})
    ways = {name: config.regime(name).pipeline for name in config.regimes}
    assert ways == {"e2e": "sequential", "segprop": "wavefront", "plain": "sequential"}


def test_a_resolved_wave_loads_again_as_the_same(tmp_path: Path) -> None:
    regimes = {"segprop": {"wavefront": {"rounds": 3}}, "plain": {"kind": "segprop", "pipeline": "sequential"}}
    config = small_config(tmp_path, {"regimes": regimes, "pipeline": "wavefront"})
    resolved = config.resolved()
    (tmp_path / "again").mkdir()
    again = small_config(tmp_path / "again", resolved)
    assert {name: again.regime(name) for name in again.regimes} == {
        name: config.regime(name) for name in config.regimes
    }
    assert "pipeline" not in small_config(tmp_path).resolved()["regimes"]["segprop"]


# -- what people see ------------------------------------------------------------------------------------------


def test_the_dry_run_says_what_overlap_can_gain(tmp_path: Path) -> None:
    small_config(tmp_path, {**WAVE, "training.epochs": 8, "resources.slots": 2})
    stream = io.StringIO()
    print_plan(prepare(tmp_path / "small.yaml", inspect=lambda data, seed: CIFAR), stream)
    text = " ".join(stream.getvalue().split())
    assert "stage2-seg2 (4 rounds)" in text
    assert "averages" in text
    assert "4 versions, 2 views + validation" in text
    assert "of work," in text
    assert "x as fast on any number of slots; on 2 about" in text


def test_a_stage_in_rounds_is_summarized_and_reported_as_one(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 8})
    commits = make_commits(plan)
    summary = summarize("fake", plan, commits, status="done", environment=ENVIRONMENT)
    regime = to_json(summary)["regimes"]["segprop"]
    assert [stage["name"] for stage in regime["stages"]] == [
        "stage1-base",
        "stage2-seg2",
        "stage3-seg3",
        "stage4-seg4",
        "final",
    ]
    stage = regime["stages"][1]
    rounds = [commits[node].result for node in plan.regimes["segprop"].work_of(stage["node"])]
    assert (stage["rounds"], stage["rounds_done"], stage["epochs"]) == (4, 4, 8)
    assert [epoch["epoch"] for epoch in stage["curve"]] == list(range(8))
    assert stage["seconds"] == sum(result["seconds"] for result in rounds)
    assert stage["snapshot"]["hits"] == sum(result["snapshot"]["hits"] for result in rounds)
    assert regime["pipeline"] == "wavefront"
    averaged = sum(commits[node].result["seconds"] for node in plan.regimes["segprop"].averages)
    kinds = regime["seconds_by_kind"]
    assert regime["seconds"] == pytest.approx(kinds["train"] + kinds["materialize"] + averaged)
    page = render(summary)
    assert "8 in 4 rounds" in page
    assert "its stages overlap" in page


def test_a_wave_that_is_under_way_shows_the_rounds_it_has(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 8})
    commits = make_commits(plan)
    for count in (0, 3, len(plan.nodes) // 2):
        done = {node.id: commits[node.id] for node in plan.nodes[:count]}
        summary = summarize("fake", plan, done, status="stopped", environment=ENVIRONMENT)
        assert render(summary)
    some = {node.id for node in plan.nodes if node.label.endswith(("round 1", "stage1-base round 2"))}
    summary = summarize(
        "fake",
        plan,
        {node: commit for node, commit in commits.items() if node in some},
        status="stopped",
        environment=ENVIRONMENT,
        failures={labelled(plan, "segprop/stage2-seg2 round 2").id: "lost"},
    )
    first, second, *_ = to_json(summary)["regimes"]["segprop"]["stages"]
    assert (first["status"], first["rounds_done"], first["epochs"]) == ("pending", 2, 4)
    assert (second["status"], second["rounds_done"]) == ("failed", 1)


def test_status_has_a_line_for_every_round(tmp_path: Path) -> None:
    record = RunRecord.of("wave", small_plan(tmp_path, {**WAVE, "training.epochs": 8}))
    lines = [record.nodes[node] for node in record.regimes["segprop"].stages]
    assert [(line.label, line.epochs) for line in lines][3:6] == [
        ("segprop/stage1-base round 4", 8),
        ("segprop/stage2-seg2 round 1", 2),
        ("segprop/stage2-seg2 round 2", 4),
    ]
    assert len(lines) == 4 * 4 + 1


# -- overlap --------------------------------------------------------------------------------------------------


def graph(edges: Mapping[str, tuple[float, str]]) -> tuple[list[Node], dict[str, float]]:
    """Name -> (seconds, names of parents)."""
    nodes = [
        Node(name, "train", name, ("r",), {}, {str(i): parent for i, parent in enumerate(parents)}, Estimate())
        for name, (_, parents) in edges.items()
    ]
    return nodes, {name: seconds for name, (seconds, _) in edges.items()}


DIAMOND = {"a": (1.0, ""), "b": (4.0, "a"), "c": (2.0, "a"), "d": (1.0, "bc")}


@pytest.mark.parametrize(("slots", "taken"), [(1, 8.0), (2, 6.0), (9, 6.0)])
def test_overlap_of_a_diamond(slots: int, taken: float) -> None:
    nodes, seconds = graph(DIAMOND)
    assert makespan.work_s(nodes, seconds) == 8.0
    assert makespan.critical_path_s(nodes, seconds) == 6.0
    assert makespan.makespan_s(nodes, seconds, slots) == taken


def test_evaluations_get_a_slot_last() -> None:
    nodes, seconds = graph({"a": (1.0, ""), "e": (5.0, "a"), "b": (2.0, "a"), "c": (2.0, "b")})
    assert makespan.makespan_s(nodes, seconds, 1) == 10.0
    nodes[1] = dataclasses.replace(nodes[1], kind="evaluate")
    assert makespan.makespan_s(nodes, seconds, 2) == 6.0


def test_equal_stages_speed_up_as_the_shape_of_the_wave_says(tmp_path: Path) -> None:
    """Four stages, four rounds: sixteen pieces of work, seven of them one after the other."""
    plan = small_plan(tmp_path, {**WAVE, "training.epochs": 4, "wavefront.final_epochs": 0})
    seconds = {node.id: 1.0 if node.kind == "train" else 0.0 for node in plan.nodes}
    assert makespan.work_s(plan.nodes, seconds) == 16.0
    assert makespan.critical_path_s(plan.nodes, seconds) == 7.0
    assert makespan.makespan_s(plan.nodes, seconds, 4) == 7.0
    # One, two, three, four, three, two and one at a time, each time over before the next begins.
    assert makespan.makespan_s(plan.nodes, seconds, 2) == 10.0
