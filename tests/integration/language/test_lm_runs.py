"""Whole runs of language models: what they leave behind, what they export, what a second one does."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_running import LLAMA, lm_changes, write_checkpoint
from running import Lab, RayHome, final_digests, summary_of, tree, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache_store.records.nodes import NodeStore
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.runs import session
from orchestrator.runs.prepare import Prepared, prepare
from workers.data.text.source import TextSource
from workers.specs import as_json
from workers.specs.data_results import TextDataResult
from workers.specs.tasks import EvaluateTask

REGIMES: dict[str, Any] = {
    "e2e": {},
    "lw": {},
    "segprop": {},
    "frozen": {"kind": "segprop", "split": {"intermediate": "frozen"}},
    "lora": {"kind": "e2e", "training": {"lora": {"rank": 2}}},
}
ON_RAY = {"resources": {"runner": "ray", "device": "cpu", "slots": 2, "threads": 1}}


@dataclass
class Story:
    config: Path
    run_dir: Path

    @property
    def prepared(self) -> Prepared:
        return prepare(self.config)

    @property
    def summary(self) -> dict[str, Any]:
        return summary_of(self.run_dir)


def texts(prepared: Prepared, split: str) -> tuple[EvaluateTask, TextSource]:
    """The evaluation of the final chain of the first regime, and its data."""
    storage = open_storage(prepared.config.store)
    regime = next(iter(prepared.plan.regimes.values()))
    node = prepared.plan.node(regime.test if split == "test" else regime.validation)
    task = as_json.from_json(EvaluateTask, node.task)
    commit = NodeStore(storage).commit_of(node.parents["data"])
    assert commit is not None
    return task, TextSource(task.experiment, commit.read(TextDataResult), SnapshotStore(storage), split)


def mean_loss(model: Any, source: TextSource) -> float:
    """Of transformers' own forward and loss, sample by sample, unpadded: the mean over all targets."""
    total = 0.0
    for sample in range(source.rows):
        batch = source.batch(np.array([sample]))
        labels = torch.full_like(batch.ids, -100)
        labels.view(-1)[batch.where + 1] = batch.targets
        with torch.inference_mode():
            output = model(input_ids=batch.ids, position_ids=batch.position_ids, labels=labels, use_cache=False)
        total += output.loss.item() * len(batch.targets)
    return total / int(source.targets.sum())


def given(story: Story) -> Any:
    """The checkpoint a run started from, as transformers has it."""
    model: Any = AutoModelForCausalLM.from_pretrained(story.config.parent / "model")
    return model.eval()


def loads(folder: Path, *, tied: bool = False) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    assert model.config.tie_word_embeddings is tied
    return model


# -- random weights, on Ray ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, ray_home: RayHome) -> Story:
    folder = tmp_path_factory.mktemp("story")
    changes = {**lm_changes(folder), **ON_RAY, "regimes": REGIMES, "model.config": {**LLAMA, "num_hidden_layers": 4}}
    config = write_config(folder, {**changes, "training.epochs": 2})
    output = folder / "output.txt"
    code = ray_home.start(str(config), "--quiet", output=output).wait(timeout=280)
    assert code == 0, output.read_text()[-4000:]
    return Story(config, folder / "run")


def test_the_summary_of_a_run_says_how_good_every_stage_made_the_model(story: Story) -> None:
    summary = story.summary
    assert summary["status"] == "done"
    assert summary["failures"] == []
    assert summary["original"] == {}, "random weights were nothing before"
    layers = {
        "e2e": [None],
        "lw": [0, 1, 2, 3, "head"],
        "segprop": [0, 1, 2],
        "frozen": [0, 1, 2],
        "lora": [None],
    }
    for name, expected in layers.items():
        regime = summary["regimes"][name]
        assert [stage["layer"] for stage in regime["stages"]] == expected, name
        assert set(regime["final"]["metrics"]) == {"loss", "accuracy", "perplexity"}
        assert regime["final"]["metrics"]["perplexity"] == pytest.approx(math.exp(regime["final"]["metrics"]["loss"]))
        for stage in regime["stages"]:
            assert bool(stage["truncated"]) == bool(stage["full"]) == (stage["layer"] is not None), (name, stage)
            losses = [epoch["train_loss"] for epoch in stage["curve"]]
            assert losses[-1] < losses[0], (name, stage["name"])
        if expected != [None]:
            # After the last stage there is one chain: cut short or whole, it is the same.
            last = regime["stages"][-1]
            assert last["truncated"]["loss"] == pytest.approx(last["full"]["loss"], rel=1e-5)
            assert regime["final"]["validation"]["loss"] == pytest.approx(last["full"]["loss"], rel=1e-5)
    for name in ("segprop", "frozen"):
        first = summary["regimes"][name]["stages"][0]
        assert first["truncated"]["loss"] != pytest.approx(first["full"]["loss"], rel=1e-3)
    assert (story.run_dir / "report.html").stat().st_size > 10_000


def test_what_was_trained_can_be_predicted_better_than_by_chance(story: Story) -> None:
    for name, regime in story.summary["regimes"].items():
        # Random weights of this scale are wrong with conviction: e2e and adapters start from the same.
        assert regime["final"]["metrics"]["loss"] < math.log(LLAMA["vocab_size"]), name


@pytest.mark.parametrize("regime", REGIMES)
def test_an_export_loads_in_transformers_and_has_the_loss_of_the_final_evaluation(story: Story, regime: str) -> None:
    model = loads(story.run_dir / "model" / regime)
    _, source = texts(story.prepared, "test")
    assert mean_loss(model, source) == pytest.approx(
        story.summary["regimes"][regime]["final"]["metrics"]["loss"], rel=1e-5
    )
    assert model.generate(torch.tensor([[65, 66]]), max_new_tokens=4, do_sample=False).shape == (1, 6)


def test_ray_and_one_process_give_the_same_weights(story: Story, tmp_path: Path) -> None:
    lab = Lab(prepare(story.config, [f"store={tmp_path / 'store'}", f"run_dir={tmp_path / 'run'}"]))
    wanted = final_digests(story.prepared)
    lab.run("frozen/stage3-layer2")
    commit = lab.commit("frozen/stage3-layer2").result["parts"]
    assert {part: facts["digest"] for part, facts in commit.items()}.items() <= wanted["frozen"].items()


def test_a_finished_run_again_reuses_everything_and_starts_no_runner(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(story.run_dir / "store"), tree(story.run_dir / "model")

    def refuse(prepared: Prepared) -> None:
        raise AssertionError("a runner was started")

    monkeypatch.setattr(session, "make_runner", refuse)
    assert main(["run", str(story.config), "--quiet"]) == 0
    summary = story.summary
    assert summary["nodes"]["reused"] == summary["nodes"]["total"] == summary["nodes"]["done"]
    assert {regime["status"] for regime in summary["regimes"].values()} == {"reused"}
    assert (tree(story.run_dir / "store"), tree(story.run_dir / "model")) == before


def test_an_export_that_was_cut_short_is_written_again(story: Story) -> None:
    folder = story.run_dir / "model" / "e2e"
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "segprop.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half of")
    left = folder.with_name(".e2e.0123abcd")
    left.mkdir()
    (left / "0.part").write_bytes(b"a killed export's")
    assert main(["run", str(story.config), "--quiet"]) == 0
    assert (folder / "model.safetensors").read_bytes() == whole
    assert not left.exists()


def test_snapshots_are_released_after_their_last_reader(story: Story) -> None:
    sets = SnapshotStore(open_storage(str(story.run_dir / "store"))).list()
    assert [item for item in sets if item.key.get("kind") == "boundary"] == []


# -- a base in pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intermediate", ["omit", "frozen"])
def test_a_base_in_pieces_trains_to_the_end_and_its_export_scores_as_the_run_says(
    tmp_path: Path, intermediate: str
) -> None:
    changes = {
        **lm_changes(tmp_path),
        "model.config": {**LLAMA, "num_hidden_layers": 5},
        "split": {"base": 3, "base_segment_size": 2, "head": 1, "intermediate": intermediate},
        "regimes": ["segprop"],
    }
    config = write_config(tmp_path, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    found = Story(config, tmp_path / "run")
    stages = found.summary["regimes"]["segprop"]["stages"]
    assert [(stage["name"], stage["trained"][:-2]) for stage in stages] == [
        ("stage1-base", ["embed", "layer0", "layer1"]),
        ("stage2-layer2", ["layer2"]),
        ("stage3-layer3", ["layer3"]),
    ]
    kept = ["layer2", "layer3", "layer4", "head"] if intermediate == "frozen" else ["layer2", "layer4", "head"]
    assert stages[0]["path"] == ["embed", "layer0", "layer1", *kept]
    _, source = texts(found.prepared, "test")
    expected = mean_loss(loads(found.run_dir / "model" / "segprop"), source)
    assert found.summary["regimes"]["segprop"]["final"]["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


# -- from the head down ----------------------------------------------------------------------------------------------


def test_top_down_trains_to_the_end_and_its_export_scores_as_the_run_says(tmp_path: Path) -> None:
    changes = {
        **lm_changes(tmp_path),
        "model.config": {**LLAMA, "num_hidden_layers": 5},
        "split": {"base": 2, "segment_size": 1, "head": 1, "intermediate": "frozen", "order": "top_down"},
        "snapshots": {"mode": "always"},
        "regimes": ["segprop"],
    }
    config = write_config(tmp_path, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    found = Story(config, tmp_path / "run")
    stages = found.summary["regimes"]["segprop"]["stages"]
    assert [(stage["name"], stage["trained"], stage["source"]) for stage in stages] == [
        ("stage1-layer3", ["layer3", "layer4", "head"], "snapshots"),
        ("stage2-layer2", ["layer2", "layer4", "head"], "snapshots"),
        ("stage3-base", ["embed", "layer0", "layer1", "layer4", "head"], "images"),
    ]
    # The path of a stage is the whole network behind its boundary, so that what it says of itself is what the network
    # scores: each stage begins where the one before ended.
    losses = [stage["metrics"]["validation_loss"] for stage in stages]
    assert losses == sorted(losses, reverse=True)
    for stage in stages:
        assert stage["assembled"]["loss"] == pytest.approx(stage["metrics"]["validation_loss"], rel=1e-5)
    _, source = texts(found.prepared, "test")
    expected = mean_loss(loads(found.run_dir / "model" / "segprop"), source)
    assert found.summary["regimes"]["segprop"]["final"]["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


# -- a checkpoint with tied embeddings -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Rates so small that no weight moves: what comes out is what went in."""
    folder = tmp_path_factory.mktemp("tied")
    path = write_checkpoint(folder / "model", tied=True)
    changes = {
        **lm_changes(folder),
        "model": {"family": "causal_lm", "path": str(path)},
        "training.optimizer": {"lr": 1e-30, "weight_decay": 0.0},
        "regimes": {"segprop": {"split": {"intermediate": "frozen"}}, "e2e": {}},
    }
    config = write_config(folder, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    return Story(config, folder / "run")


def test_the_original_is_scored_beside_the_regimes(tied: Story) -> None:
    summary = tied.summary
    model = given(tied)
    assert model.config.tie_word_embeddings
    for split in ("validation", "test"):
        _, source = texts(tied.prepared, split)
        assert summary["original"][split]["loss"] == pytest.approx(mean_loss(model, source), rel=1e-5)
    for regime in summary["regimes"].values():
        assert regime["final"]["metrics"] == summary["original"]["test"]
        assert regime["final"]["validation"] == summary["original"]["validation"]


@pytest.mark.parametrize("regime", ["segprop", "e2e"])
def test_the_export_of_an_untrained_tied_model_is_the_model(tied: Story, regime: str) -> None:
    """Also where a stage would have parted the two: nothing moved, so they are one."""
    folder = tied.run_dir / "model" / regime
    model, original = loads(folder, tied=True), given(tied)
    state: Mapping[str, torch.Tensor] = model.state_dict()
    assert state.keys() == original.state_dict().keys()
    assert [name for name, tensor in original.state_dict().items() if not torch.equal(tensor, state[name])] == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_export_brings_its_tokenizer_and_chat_template(tied: Story) -> None:
    ours = AutoTokenizer.from_pretrained(tied.run_dir / "model" / "e2e")
    theirs = AutoTokenizer.from_pretrained(tied.config.parent / "model")
    text = "some words, and ünïcödé"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    talk = [{"role": "user", "content": "so?"}]
    assert ours.apply_chat_template(talk, tokenize=False) == theirs.apply_chat_template(talk, tokenize=False) != ""


def test_training_the_head_of_a_tied_model_leaves_its_embedding_alone(tied: Story, tmp_path: Path) -> None:
    changes = [
        "split.train_base=false",
        "split.base=3",
        "split.head=0",
        "training.optimizer.lr=0.01",
        "regimes=[segprop]",
    ]
    lab = Lab(prepare(tied.config, [*changes, f"store={tmp_path}"]))
    lab.run("segprop/stage1-base")
    weights = lab.weights("segprop/stage1-base")
    assert set(weights) == {"head/model.norm.weight", "head/lm_head.weight"}
    original = AutoModelForCausalLM.from_pretrained(tied.config.parent / "model").state_dict()
    assert not torch.equal(weights["head/lm_head.weight"], original["lm_head.weight"])
    assert lab.prepared.plan.regimes["segprop"].weights["embed"] == lab.node("model").id


def test_nothing_is_left_in_the_working_directory(tied: Story) -> None:
    assert sorted(os.listdir(tied.config.parent)) == ["model", "run", "text.jsonl", "tiny.yaml"]
