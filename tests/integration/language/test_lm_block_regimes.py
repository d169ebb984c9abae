"""BAdam and LISA on language models: against an ordinary loop over transformers' own model, and what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import LLAMA, imported, lm_changes, plain_names
from ordinary_turns import OrdinaryTurns
from running import DEVICE, Lab, StopAfter, digests, summary_of, write_config
from transformers import AutoConfig, AutoModelForCausalLM

from cache_store.errors import Interrupted
from cache_store.snapshots.store import SnapshotStore
from orchestrator.cli import main
from orchestrator.regimes.blocks import choices
from workers.data.text.source import TextSource
from workers.specs import as_json
from workers.specs.data_results import TextDataResult
from workers.specs.language import CausalLMSpec
from workers.specs.tasks import StageTask
from workers.tracing import trace_stage
from workers.training import clocks
from workers.training.shuffle import epoch_order

#: 10 steps an epoch, 20 in all. A larger epsilon keeps noise of other orders of sums small, as in test_lm_plain_loop.
STEPS = {"data.train_limit": 80, "training.epochs": 2, "training.optimizer": {"lr": 5e-3, "eps": 1e-4}}
TIED = {**LLAMA, "tie_word_embeddings": True}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "badam": ("badam", {"blocks": {"steps": 3}}),
    "badam, tied, random, clipped": ("badam", {"blocks": {"steps": 3, "order": "random"}}),
    "badam, LM head frozen": ("badam", {"blocks": {"steps": 3}, "training": {"lm_head": "frozen"}}),
    "lisa": ("lisa", {"blocks": {"steps": 3}}),
    "lisa, tied": ("lisa", {"blocks": {"steps": 3, "count": 1}}),
}


def changes(folder: Path, case: str) -> tuple[str, dict[str, Any]]:
    kind, own = CASES[case]
    made = {**lm_changes(folder), **STEPS, "regimes": {kind: own}}
    if "tied" in case:
        made["model.config"] = TIED
    if "clipped" in case:
        made["training.clip"] = 0.5
    return kind, made


def part_of(name: str) -> str:
    words = name.split(".")
    if "layers" in words:
        return f"layer{words[words.index('layers') + 1]}"
    return "embed" if "embed_tokens" in words else "head"


def ordinary_loop(task: StageTask, initial: dict[str, torch.Tensor], texts: TextSource) -> Any:
    train, seed = task.train, task.experiment.seed
    assert isinstance(task.experiment.model, CausalLMSpec)
    assert task.schedule is not None
    config = dict(task.experiment.model.config or {})
    kind = AutoConfig.for_model(config.pop("model_type"), **config)
    model: Any = AutoModelForCausalLM.from_config(kind)  # type: ignore[no-untyped-call]
    model.load_state_dict(initial)
    model.to(DEVICE).train()
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        frozen = train.lm_head == "frozen" and name.startswith("lm_head")
        if not frozen:
            parts.setdefault(part_of(name), []).append(parameter)
    if train.lm_head == "frozen":
        model.lm_head.requires_grad_(False)
    turns = OrdinaryTurns(task.schedule, (seed, "stage", task.name), parts, train.optimizer)
    per_epoch, size = texts.rows // train.batch_size, train.batch_size
    for step in range(per_epoch * train.epochs):
        epoch, within = divmod(step, per_epoch)
        batch = texts.batch(epoch_order(seed, epoch, texts.rows)[within * size : (within + 1) * size])
        labels = torch.full_like(batch.ids, -100)
        labels.view(-1)[batch.where + 1] = batch.targets
        turns.begin(step)
        model(
            input_ids=batch.ids.to(DEVICE),
            position_ids=batch.position_ids.to(DEVICE),
            labels=labels.to(DEVICE),
            num_items_in_batch=torch.tensor(len(batch.targets)).to(DEVICE),
            use_cache=False,
        ).loss.backward()
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        turns.step(train.optimizer.lr)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


@pytest.mark.parametrize("case", CASES)
def test_layers_that_take_turns_equal_an_ordinary_transformers_loop_over_20_steps(folder: Path, case: str) -> None:
    kind, made = changes(folder, case)
    lab = Lab.make(folder, made)
    commit = lab.run(f"{kind}/{kind}")
    assert commit.result["steps"] == 20
    task = as_json.from_json(StageTask, lab.node(f"{kind}/{kind}").task)
    texts = TextSource(task.experiment, lab.commit("data").read(TextDataResult), SnapshotStore(lab.storage), "train")
    initial = imported(lab)
    model = ordinary_loop(task, initial, texts)
    trained = plain_names(lab.weights(f"{kind}/{kind}"))
    expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert trained.keys() == expected.keys()
    moved = max(float((expected[name] - initial[name]).abs().max()) for name in expected)
    apart = max(float((expected[name] - trained[name]).abs().max()) for name in expected)
    assert moved > 0.02
    # Each turn's first steps, with moments from nothing, go by the sign of a gradient more than by its size: noise of
    # another order of sums weighs more than where one optimizer goes on. A wrong turn would be as large as `moved`.
    assert apart < 3e-4 * moved


def test_a_matrix_that_two_parts_share_is_one_block(folder: Path) -> None:
    _, made = changes(folder, "badam, tied, random, clipped")
    node = Lab.make(folder, made).node("badam/badam")
    assert node.task["tied"] is True
    assert node.task["schedule"]["blocks"] == [["embed", "head"], ["layer0"], ["layer1"], ["layer2"]]


def test_a_norm_that_is_left_of_a_frozen_lm_head_has_no_turn_of_its_own(folder: Path) -> None:
    _, made = changes(folder, "badam, LM head frozen")
    untied = Lab.make(folder, made).node("badam/badam").task["schedule"]["blocks"]
    assert untied == [["embed"], ["layer0"], ["layer1"], ["layer2", "head"]]
    tied = Lab.make(folder, {**made, "model.config": TIED}).node("badam/badam").task["schedule"]["blocks"]
    assert tied == [["layer0"], ["layer1"], ["layer2", "head"]], "nothing of the embedding is trained"


@pytest.mark.parametrize("optimizer", [{"lr": 1e-2}, {"lr": 1e-2, "rounding": "compensated"}, {"name": "adamw8bit"}])
def test_bfloat16_weights_stopped_inside_a_turn_go_on_to_the_same_bits(
    tmp_path: Path, optimizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    made = {
        **lm_changes(tmp_path),
        **STEPS,
        "model.master": "bfloat16",
        "training.optimizer": optimizer,
        "regimes": {"lisa": {"blocks": {"steps": 4, "count": 1}}},
    }
    if optimizer.get("name") == "adamw8bit":
        made["training.optimizer"]["rounding"] = "nearest"
    lab = Lab.make(tmp_path, made)
    lab.prepare("lisa/lisa")
    other = lab.linked_copy(tmp_path / "other")
    whole = lab.run("lisa/lisa")
    for looks in (6, 2):  # two steps into the second turn, at its end
        with pytest.raises(Interrupted):
            other.run("lisa/lisa", StopAfter(looks))
    commit = other.run("lisa/lisa")
    assert digests(commit) == digests(whole)
    assert commit.result["trained_at_once"] == whole.result["trained_at_once"]


@pytest.fixture(scope="module")
def lab(folder: Path) -> Lab:
    """Layers that are alike, wide enough to matter beside the embedding."""
    made = {
        **lm_changes(folder),
        "model.config": {**LLAMA, "num_hidden_layers": 8},
        "regimes": {"e2e": {}, "badam": {"blocks": {"steps": 1}}, "lisa": {"blocks": {"steps": 1}}},
    }
    return Lab.make(folder, made)


def test_the_plan_counts_the_state_of_one_choice_and_all_that_is_trained(lab: Lab) -> None:
    estimates = {name: lab.node(f"{name}/{name}").estimate for name in ("e2e", "badam", "lisa")}
    part = {"layer": 9_280, "embed": 260 * 32, "head": 260 * 32 + 32}
    everything = 8 * part["layer"] + part["embed"] + part["head"]
    assert all(each.trainable == everything for each in estimates.values())
    assert estimates["e2e"].optimizer_bytes == 8 * everything
    assert estimates["badam"].optimizer_bytes == 8 * max(part.values())
    assert estimates["lisa"].optimizer_bytes == 8 * (2 * part["layer"] + part["embed"] + part["head"])
    assert estimates["badam"].peak_bytes < estimates["lisa"].peak_bytes < estimates["e2e"].peak_bytes
    # Backward passes end at the block in turn, of LISA always at the embedding.
    assert 0.5 < estimates["badam"].flops / estimates["e2e"].flops < 0.7
    assert 0.7 < estimates["lisa"].flops / estimates["e2e"].flops < 0.9


@pytest.mark.parametrize("kind", ["badam", "lisa"])
def test_the_optimizer_of_the_real_step_holds_what_the_plan_says(
    lab: Lab, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.training.optimizer import StageStep

    most: list[int] = []
    plain = StageStep.update

    def watched(step: StageStep, rate: float) -> None:
        plain(step, rate)
        held = [value for state in step.optimizer.state.values() for value in state.values()]
        most.append(sum(value.nbytes for value in held if value.ndim))

    monkeypatch.setattr(StageStep, "update", watched)
    commit = lab.run(f"{kind}/{kind}")
    assert max(most) <= lab.node(f"{kind}/{kind}").estimate.optimizer_bytes
    task = as_json.from_json(StageTask, lab.node(f"{kind}/{kind}").task)
    assert task.schedule is not None
    assert 8 * commit.result["trained_at_once"] == max(most)
    assert len(choices(task.schedule)) == (10 if kind == "badam" else 8)


@pytest.mark.parametrize("kind", ["badam", "lisa"])
def test_a_trace_of_all_turns_holds_the_optimizer_of_the_plan_and_less_than_end_to_end(lab: Lab, kind: str) -> None:
    sample = lab.prepared.config.domain.sample(lab.prepared.config.data, lab.prepared.data)
    traced = {
        name: trace_stage(as_json.from_json(StageTask, lab.node(f"{name}/{name}").task), sample)
        for name in ("e2e", kind)
    }
    predicted = lab.node(f"{kind}/{kind}").estimate
    assert traced[kind].optimizer == pytest.approx(predicted.optimizer_bytes, rel=0.01)
    assert traced[kind].peak == pytest.approx(predicted.peak_bytes, rel=0.2), (
        "small tensors, of which the plan is rough"
    )
    assert traced[kind].peak < traced["e2e"].peak


def test_the_summary_of_a_run_says_what_was_trained_at_one_time(tmp_path: Path) -> None:
    made = {
        **lm_changes(tmp_path),
        "regimes": {"e2e": {}, "badam": {"blocks": {"steps": 1}}, "mine": {"kind": "lisa", "blocks": {"count": 1}}},
    }
    assert main(["run", str(write_config(tmp_path, made)), "--quiet"]) == 0
    regimes = summary_of(tmp_path / "run")["regimes"]
    assert "trained_at_once" not in regimes["e2e"]
    assert regimes["e2e"]["trainable_parameters"] == regimes["badam"]["trainable_parameters"]
    assert 0 < regimes["badam"]["trained_at_once"] < regimes["mine"]["trained_at_once"]
    assert regimes["mine"]["notes"] == [
        "Trains 1 of 3 blocks at a time beside embed and head, sampled, 20 steps each: about 1 turn in 4 steps. "
        "Not every block has its turn; with blocks.steps at most 1, or with more epochs, it may."
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model" / "badam")
    assert sum(parameter.numel() for parameter in model.parameters()) == regimes["badam"]["trainable_parameters"]
