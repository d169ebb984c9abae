"""A checkpoint whose LM head is its embedding: one matrix while no stage trains one without the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import lm_changes, plain_names, write_checkpoint
from running import Lab, StopAfter, digests, summary_of, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cache_store.errors import Interrupted
from orchestrator.cli import main
from orchestrator.runs.prepare import prepare
from workers.training import clocks

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Of the tiny Llama.
MATRIX = 260 * 32
FROZEN = {"lm_head": "frozen"}
LATER = {"segments": FROZEN}
LORA = {"lora": {"rank": 2}}
#: Regime -> whether its export is tied, and whether the matrix moved.
REGIMES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "e2e": ({}, True, True),
    "segprop": ({}, False, True),
    "frozen": ({"kind": "segprop", "training": FROZEN}, True, False),
    "later": ({"kind": "segprop", "stages": LATER}, True, True),
    "lora": ({"kind": "e2e", "training": LORA}, True, False),
    "lw": ({}, False, True),
    "local": ({"kind": "lw", "training": FROZEN}, True, False),
    "fixed": ({"kind": "e2e", "training": FROZEN}, True, False),
    "wave": (
        {
            "kind": "segprop",
            "pipeline": "wavefront",
            "wavefront": {"rounds": 2},
            "training": {"epochs": 2},
            "stages": LATER,
        },
        False,
        True,
    ),
}


@dataclass
class Story:
    config: Path
    run_dir: Path

    def weights(self, regime: str) -> dict[str, torch.Tensor]:
        """The export as it lies there, without what transformers makes of it."""
        return load_file(self.run_dir / "model" / regime / "model.safetensors")


def tied_changes(folder: Path, **checkpoint: Any) -> dict[str, Any]:
    path = write_checkpoint(folder / "model", tied=True, **checkpoint)
    return {**lm_changes(folder), "model": {"family": "causal_lm", "path": str(path)}}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("tied")
    changes = {**tied_changes(folder), "regimes": {name: settings for name, (settings, *_) in REGIMES.items()}}
    config = write_config(folder, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    return Story(config, folder / "run")


@pytest.mark.parametrize("regime", REGIMES)
def test_an_export_is_tied_where_the_regime_kept_the_two_one(story: Story, regime: str) -> None:
    _, tied, moves = REGIMES[regime]
    folder = story.run_dir / "model" / regime
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    held = story.weights(regime)
    assert (LM_HEAD not in held) is tied
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    original: Any = AutoModelForCausalLM.from_pretrained(story.config.parent / "model")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        parameter.numel() for parameter in original.parameters()
    ) + (0 if tied else MATRIX)
    assert torch.equal(model.model.embed_tokens.weight, held[EMBEDDING])
    same = torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert same is not moves


@pytest.mark.parametrize("regime", REGIMES)
def test_summary_and_report_say_where_the_two_part(story: Story, regime: str) -> None:
    notes = summary_of(story.run_dir)["regimes"][regime].get("notes")
    assert (notes is None) is REGIMES[regime][1]
    if notes is None:
        return
    (note,) = notes
    first = "stage2-layer1" if regime == "segprop" else "stage1"
    assert first in note
    assert "training.lm_head: frozen" in note
    assert f"{MATRIX:,} parameters more" in note
    assert "LM head are one matrix, but stage" in (story.run_dir / "report.html").read_text()


def test_the_dry_run_says_where_the_two_part(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(story.config), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for regime, (_, tied, _) in REGIMES.items():
        assert (f"{regime}: The model's embedding and LM head are one matrix" in said) is not tied


def test_the_plan_counts_what_a_stage_trains(story: Story) -> None:
    summary = summary_of(story.run_dir)
    for name, regime in summary["regimes"].items():
        for stage in regime["stages"]:
            assert stage["estimate"]["predicted"]["trainable"] == stage["trainable_parameters"], (name, stage["name"])
    plan = prepare(story.config).plan
    whole = sum(tensor.numel() for tensor in story.weights("e2e").values())
    assert plan.node(plan.regimes["e2e"].stages[0]).estimate.parameters == whole
    assert plan.node(plan.regimes["e2e"].test).estimate.parameters == whole
    assert plan.node(plan.regimes["segprop"].test).estimate.parameters == whole + MATRIX
    (model,) = [node for node in plan.nodes if node.initializes]
    assert model.estimate.parameters == whole


def test_stages_before_the_one_that_parts_them_train_one_matrix(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path, {**tied_changes(tmp_path), "regimes": ["segprop"], "training.head_optimizer": "carry"})
    base = lab.run("segprop/stage1-base")
    weights = plain_names(lab.weights("segprop/stage1-base"))
    assert torch.equal(weights[EMBEDDING], weights[LM_HEAD])
    carried = load_file(Path(lab.store) / base.files["optimizer.safetensors"].path)
    assert f"embed/{EMBEDDING}//exp_avg" in carried
    assert torch.equal(carried[f"head/{LM_HEAD}//exp_avg"], carried[f"embed/{EMBEDDING}//exp_avg"])
    lab.run("segprop/stage2-layer1")
    after = plain_names(lab.weights("segprop/stage2-layer1"))
    assert not torch.equal(after[LM_HEAD], weights[LM_HEAD])
    assert lab.prepared.plan.regimes["segprop"].weights["embed"] == base.node


RESUMED: dict[str, dict[str, Any]] = {
    "float32, clipped": {"training.clip": 0.5, "training.micro_batch": 3},
    "bfloat16, rounded by chance": {"model.master": "bfloat16"},
    "adamw in 8 bits": {"training.optimizer": {"name": "adamw8bit", "lr": 1e-2}},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_tied_stage_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    changes = {
        **tied_changes(tmp_path),
        "regimes": ["e2e"],
        "training.epochs": 3,
        "training.commit": "best",
        **RESUMED[case],
    }
    reference = Lab.make(tmp_path, changes)
    reference.prepare("e2e/e2e")
    other = reference.linked_copy(tmp_path / "other")
    whole = reference.run("e2e/e2e")
    with pytest.raises(Interrupted, match="epoch 2, step 2"):
        other.run("e2e/e2e", StopAfter(6))
    resumed = other.run("e2e/e2e")
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(whole)
    weights = plain_names(other.weights("e2e/e2e"))
    assert torch.equal(weights[EMBEDDING], weights[LM_HEAD])
    assert resumed.result["trainable_parameters"] == sum(
        tensor.numel() for name, tensor in weights.items() if name != LM_HEAD
    )
