"""Benchmarks in a plan: which networks are asked, what a score is known by, and when it is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes, write_checkpoint
from running import write_config
from text_makers import mmlu_folder

from cache_store.errors import ConfigError, UserError
from orchestrator.execution.ready_queue import ReadyQueue
from orchestrator.plan.graph import Node, Plan
from orchestrator.runs.prepare import prepare
from orchestrator.runs.results import weights_after
from workers.judge import outlook

SENTENCE = '{"sentence": "The _ is wet.", "option1": "sea", "option2": "sun", "answer": "1"}\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and questions."""
    folder = tmp_path_factory.mktemp("judged")
    write_checkpoint(folder / "model")
    root = folder / "data" / "mmlu"
    mmlu_folder(root, ("anatomy",))
    for split in ("dev", "val", "test"):
        shutil.copy(root / split / f"anatomy_{split}.csv", root / split / f"law_{split}.csv")
    write_winogrande(folder / "data")
    return folder


def write_winogrande(data: Path, sentence: str = SENTENCE) -> None:
    (data / "winogrande").mkdir(exist_ok=True)
    for name in ("train_xs", "dev"):
        (data / "winogrande" / f"{name}.jsonl").write_text(3 * sentence)


def plan_of(place: Path, judge: dict[str, Any] | None = None, *overrides: str) -> Plan:
    changes = {
        **lm_changes(place),
        "model": {"family": "causal_lm", "path": str(place / "model")},
        "regimes": {"e2e": {}, "lw": {}, "segprop": {}},
        "evaluation": {"judge": {"data": str(place / "data"), "shots": 1, **(judge or {})}},
    }
    return prepare(write_config(place / "configs", changes), overrides).plan


def judged(plan: Plan) -> list[str]:
    return [node.label for node in plan.nodes if node.judges]


def ids(plan: Plan, **where: str) -> dict[str, str]:
    """Label -> id of the nodes of a kind, or of a benchmark."""
    return {
        node.label: node.id
        for node in plan.nodes
        if all(str(getattr(node, key, node.task.get(key))) == value for key, value in where.items())
    }


def test_the_original_and_the_whole_network_after_every_stage_are_asked_every_benchmark(place: Path) -> None:
    plan = plan_of(place)
    asked = [label for label in judged(plan) if "mmlu" in label]
    assert asked == [
        "e2e/mmlu of the original",
        "e2e/mmlu after e2e",
        *(f"lw/mmlu after {name}" for name in ("stage1-embed-layer0", "stage2-layer1", "stage3-layer2", "head")),
        *(f"segprop/mmlu after {name}" for name in ("stage1-base", "stage2-layer1")),
    ]
    assert [label.replace("winogrande", "mmlu") for label in judged(plan) if "winogrande" in label] == asked
    assert set(ids(plan, kind="judge").values()) <= set(plan.targets)
    for regime in plan.regimes.values():
        for stage, node in regime.judged["mmlu"].items():
            # What the assembled network is scored by.
            assert weights(plan.node(node)) == weights(plan.node(regime.assembled[stage]))
        assert weights(plan.node(regime.judged["mmlu"][regime.stages[-1]])) == regime.weights


def weights(node: Node) -> dict[str, str]:
    return {role.removeprefix("weights/"): node_id for role, node_id in node.parents.items() if "weights/" in role}


def test_networks_after_a_stage_are_found_without_their_scores(place: Path) -> None:
    scored, silent = plan_of(place), plan_of(place, None, "evaluation.judge=null", "evaluation.stages=false")
    for name, regime in scored.regimes.items():
        for stage in regime.stages:
            assert weights_after(silent, name, stage) == weights(scored.node(regime.judged["mmlu"][stage]))


def test_stages_that_overlap_are_judged_as_they_end(place: Path) -> None:
    wave = ("pipeline=wavefront", "training.epochs=4", "regimes=[segprop]")
    plan = plan_of(place, {"tasks": ["mmlu"]}, *wave)
    regime = plan.regimes["segprop"]
    assert list(regime.judged["mmlu"]) == list(regime.stages)
    assert all(
        weights(plan.node(node)) == weights_after(plan, "segprop", s) for s, node in regime.judged["mmlu"].items()
    )
    assert weights(plan.node(regime.judged["mmlu"][regime.stages[-1]])) == regime.weights
    assert list(plan_of(place, {"of": ["final"]}, *wave).regimes["segprop"].judged["mmlu"]) == [regime.stages[-1]]
    silent = plan_of(place, None, *wave, "evaluation.judge=null", "evaluation.stages=false")
    with pytest.raises(UserError, match="its stages overlap, and what the network was when one ended was not scored"):
        weights_after(silent, "segprop", silent.regimes["segprop"].stages[0])


def test_a_score_waits_for_the_one_before_where_a_stage_may_be_left_out(place: Path) -> None:
    exits = plan_of(place, {"tasks": ["mmlu"]}, "regimes=[segprop]", "run_exit.loss=9")
    nodes = list(exits.regimes["segprop"].judged["mmlu"].values())
    assert [exits.node(node).parents.get("before") for node in nodes] == [None, nodes[0]]
    plain = plan_of(place, {"tasks": ["mmlu"]}, "regimes=[segprop]")
    assert not any("before" in node.parents for node in plain.nodes)


@pytest.mark.parametrize(
    ("of", "count", "original"),
    [(["original"], 0, True), (["stages"], 7, False), (["final"], 3, False), (["original", "final"], 3, True)],
)
def test_which_networks_are_asked_can_be_chosen(place: Path, of: list[str], count: int, original: bool) -> None:
    plan = plan_of(place, {"of": of, "tasks": ["mmlu"]})
    stages = [node for regime in plan.regimes.values() for node in regime.judged.get("mmlu", {}).values()]
    assert (len(stages), bool(plan.judged)) == (count, original)


def test_a_score_is_known_by_weights_settings_and_questions(place: Path, tmp_path: Path) -> None:
    before = plan_of(place)
    trained, mmlu, winogrande = (
        ids(before, kind="train"),
        ids(before, benchmark="mmlu"),
        ids(before, benchmark="winogrande"),
    )
    fewer = plan_of(place, {"limit": 2})
    assert ids(fewer, kind="train") == trained
    assert not set(ids(fewer, benchmark="mmlu").values()) & set(mmlu.values())
    # What a benchmark has no use for, and what is allowed, change nothing.
    one = plan_of(place, {"subjects": ["law"], "seed": 3, "max_new_tokens": 9, "allow_contaminated": True})
    assert not set(ids(one, benchmark="mmlu").values()) & set(mmlu.values())
    assert set(ids(one, benchmark="winogrande").values()) != set(winogrande.values())  # its seed
    allowed = plan_of(place, {"max_new_tokens": 9, "allow_contaminated": True})
    assert ids(allowed, kind="judge") == ids(before, kind="judge")
    # Where the files lie does not count, what is in them does.
    moved = tmp_path / "moved"
    shutil.copytree(place / "data", moved)
    assert ids(plan_of(place, {"data": str(moved)}), kind="judge") == ids(before, kind="judge")
    write_winogrande(moved, SENTENCE.replace("wet", "dry"))
    changed = plan_of(place, {"data": str(moved)})
    assert ids(changed, benchmark="mmlu") == mmlu
    assert not set(ids(changed, benchmark="winogrande").values()) & set(winogrande.values())


def test_the_untouched_model_is_judged_once_for_whatever_is_trained_on(place: Path) -> None:
    here, there = plan_of(place), plan_of(place, None, "data.sequence_length=16", "training.epochs=2")
    assert here.judged == there.judged
    assert not set(ids(here, kind="train").values()) & set(ids(there, kind="train").values())


def test_stages_come_before_scores_and_scores_before_benchmarks(place: Path) -> None:
    plan = plan_of(place, {"tasks": ["mmlu"]}, "regimes=[segprop]")
    queue, order = ReadyQueue(plan, committed=set()), list[str]()
    while (node := queue.take(lambda node_id: True)) is not None:
        queue.start(node.id)
        queue.stop(node.id)
        queue.commit(node.id)
        order.append(node.kind)
    kinds = list(dict.fromkeys(order))
    assert kinds.index("evaluate") > max(index for index, kind in enumerate(kinds) if kind in ("train", "materialize"))
    assert order[-order.count("judge") :] == ["judge"] * 3


def test_questions_are_compared_with_those_trained_on_as_soon_as_these_are_there(place: Path) -> None:
    texts = plan_of(place, {"tasks": ["mmlu"]})
    assert [set(node.parents) for node in texts.nodes if node.kind == "questions"] == [{"model"}]
    trained = plan_of(
        place, {"tasks": ["mmlu"]}, f"data={{name: mmlu, path: {place / 'data' / 'mmlu'}, sequence_length: 64}}"
    )
    questions = {node.id: set(node.parents) for node in trained.nodes if node.kind == "questions"}
    # Of the original alone, and of what is trained.
    assert sorted(map(len, questions.values())) == [1, 2]
    assert questions[trained.node(trained.judged["mmlu"]).parents["questions"]] == {"model"}
    assert all(
        questions[trained.node(node).parents["questions"]] == {"model", "data"}
        for regime in trained.regimes.values()
        for node in regime.judged["mmlu"].values()
    )


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"data": "absent"}, "evaluation.judge.data: mmlu: absent/mmlu: holds no test/<subject>_test.csv"),
        ({"tasks": ["mmul"]}, "did you mean 'mmlu'?"),
        ({"tasks": ["winogrande"], "subjects": ["law"]}, "are those of MMLU, which is not among the tasks"),
        ({"subjects": ["lore"]}, "has no files of lore; it has those of anatomy, law"),
        ({"shots": 6}, "evaluation.judge.shots: 6"),
        ({"shots": 5}, "anatomy_dev.csv: has 3 different examples, and 5 are to stand before a question"),
        ({"shots": 2}, "train_xs.jsonl: has 1 different examples"),
        ({"tasks": ["humaneval"]}, "evaluation.judge.allow_code_execution: false"),
        ({"tasks": ["humaneval_plus"], "allow_code_execution": True}, "has none of HumanEvalPlus*.jsonl"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_starts(place: Path, judge: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(place, judge)
    assert words in caught.value.message


def test_a_network_that_does_not_fit_the_device_as_a_whole_is_not_judged_there(place: Path) -> None:
    device = ("resources.device=cuda", "training.precision=fp32")
    assert judged(plan_of(place, None, *device, "resources.device_memory=24GB"))
    with pytest.raises(
        ConfigError, match=r"evaluation\.judge: a benchmark is asked of the whole network on the device"
    ):
        plan_of(place, None, *device, "resources.device_memory=1GB")


def test_a_missing_harness_is_said_before_anything_starts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install segprop\[eval\]"):
        plan_of(place)


def test_images_are_asked_no_questions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.judge: .*is for language models"):
        prepare(write_config(tmp_path, {"evaluation": {"judge": {"data": "anywhere"}}}))
