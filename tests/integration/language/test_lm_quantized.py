"""Stages over frozen layers in few bits: less is held, the same is stored, and a stopped stage goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from four_bits import needs_torchao, torchao_there
from lm_running import LLAMA, imported, lm_changes
from running import Lab, StopAfter, checksums, digests

from cache_store.errors import Interrupted
from workers.training import clocks

pytest.importorskip("bitsandbytes")
#: Original layers 0 and 1 are stored, 2 and 3 lie frozen between them and the head.
WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
SPLIT = {"base": 2, "head": 1, "train_base": False, "intermediate": "frozen"}


def lab(folder: Path, *, master: str = "float32", **training: Any) -> Lab:
    folder.mkdir(exist_ok=True)
    changes = {
        **lm_changes(folder),
        "model.master": master,
        "model.config": WIDE,
        "split": SPLIT,
        "snapshots.retention": "keep",
        **{f"training.{key}": value for key, value in training.items()},
    }
    return Lab.make(folder, changes)


def labels(made: Lab, kind: str) -> list[str]:
    return [node.label for node in made.prepared.plan.nodes if node.kind == kind]


@pytest.fixture(scope="module")
def labs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lab]:
    found = {}
    for mode in ("full", "int8", "nf4"):
        found[mode] = lab(tmp_path_factory.mktemp(mode), frozen_weights=mode)
        found[mode].run_all(("data", "model", "train", "materialize"))
    return found


def first_stage(made: Lab) -> dict[str, Any]:
    result: dict[str, Any] = made.commit(labels(made, "train")[0]).result
    return result


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_frozen_layers_hold_less_and_train_nearly_the_same(labs: dict[str, Lab], mode: str) -> None:
    full, few = first_stage(labs["full"]), first_stage(labs[mode])
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    saved = full["resident_bytes"] - few["resident_bytes"]
    assert (2.9 if mode == "int8" else 3.4) * matrices < saved < 3.5 * matrices
    assert full["trainable_parameters"] == few["trainable_parameters"]
    loss, rounded = (result["epochs"][0]["train_loss"] for result in (full, few))
    assert loss != rounded
    assert rounded == pytest.approx(loss, rel=0.02 if mode == "int8" else 0.1)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_snapshots_of_original_layers_are_made_of_whole_weights(labs: dict[str, Lab], mode: str) -> None:
    # The sets that the first stage reads: whatever trains later differs, these may not.
    for part in ("train", "validation"):
        name = next(label for label in labels(labs[mode], "materialize") if part in label)
        assert checksums(labs[mode].snapshots(name)) == checksums(labs["full"].snapshots(name))


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_a_layer_that_was_frozen_in_few_bits_is_trained_and_committed_whole(labs: dict[str, Lab], mode: str) -> None:
    origin = imported(labs[mode])
    tensors: dict[str, torch.Tensor] = {}
    for label in labels(labs[mode], "train"):
        tensors |= {key.partition("/")[2]: value for key, value in labs[mode].weights(label).items()}
    key = "model.layers.3.mlp.up_proj.weight"
    assert tensors[key].dtype == torch.float32
    # One epoch at 1e-2 moves a weight by a few hundredths; a layer started from sixteen levels would be off by more.
    assert len(np.unique(tensors[key].numpy())) > 1000
    assert 0 < float((tensors[key] - origin[key]).abs().max()) < 0.1


def assert_goes_on_to_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """A stage that is stopped after three steps ends with the weights of one that is not."""
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    whole, broken = (lab(folder / name, epochs=2, **settings) for name in ("whole", "broken"))
    label = labels(whole, "train")[0]
    wanted = digests(whole.run(label))
    broken.prepare(label)
    with pytest.raises(Interrupted):
        broken.run(label, StopAfter(3))
    commit = broken.run(label)
    assert commit.result["resumed"]
    assert digests(commit) == wanted


def test_a_stopped_stage_with_few_bits_everywhere_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"frozen_weights": "nf4", "optimizer.name": "adamw8bit"}
    assert_goes_on_to_the_same_weights(tmp_path, monkeypatch, **settings)


@needs_torchao
@pytest.mark.parametrize("master", ["float32", "bfloat16"])
def test_a_stopped_stage_with_moments_in_4_bits_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, master: str
) -> None:
    settings: dict[str, Any] = {"master": master, "optimizer.name": "adamw4bit"}
    with torchao_there():
        assert_goes_on_to_the_same_weights(tmp_path, monkeypatch, **settings)


def test_adapters_over_few_bits_go_on_after_a_stop_and_commit_whole_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QLoRA end to end."""
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    settings: dict[str, Any] = {"frozen_weights": "nf4", "lora": {"rank": 4}}
    made = {}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        changes = {**lm_changes(tmp_path / name), "model.config": WIDE, "regimes": ["e2e"]}
        made[name] = Lab.make(
            tmp_path / name, {**changes, **{f"training.{key}": value for key, value in settings.items()}}
        )
    commit = made["whole"].run("e2e/e2e")
    plain = {name.partition("/")[2]: tensor for name, tensor in made["whole"].weights("e2e/e2e").items()}
    origin = imported(made["whole"])
    assert {name: tensor.dtype for name, tensor in plain.items()} == {name: t.dtype for name, t in origin.items()}
    key = "model.layers.3.mlp.up_proj.weight"
    assert 0 < float((plain[key] - origin[key]).norm() / origin[key].norm()) < 0.3
    key = "model.layers.3.input_layernorm.weight"
    assert torch.equal(plain[key], origin[key])
    # Layers' matrices take little more than half a byte; adapters and the rest are float32.
    matrices = 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    whole = 4 * sum(tensor.numel() for tensor in origin.values())
    adapters = 4 * commit.result["trainable_parameters"]
    assert commit.result["resident_bytes"] == pytest.approx(whole - 3.4375 * matrices + adapters, rel=0.02)
    made["broken"].prepare("e2e/e2e")
    with pytest.raises(Interrupted):
        made["broken"].run("e2e/e2e", StopAfter(2))
    resumed = made["broken"].run("e2e/e2e")
    assert resumed.result["resumed"]
    assert digests(resumed) == digests(commit)
