"""Runs of a small BERT on pairs of texts in a CSV file: three regimes, what they export, and stages that stop."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Lab, StopAfter, digests, summary_of, write_config
from text_classifiers import network_of, text_spec, word_pieces
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cache_store.errors import Interrupted
from orchestrator.cli import main
from workers.specs.data_results import TextDataResult
from workers.training import clocks

NAMES = ("no", "so", "yes")


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Changes that make `running.TINY` a text classifier's: a checkpoint without a head, its tokenizer, and rows."""
    folder = tmp_path_factory.mktemp("given")
    network = network_of(text_spec("bert", num_hidden_layers=2))
    state = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("classifier")}
    network.save_pretrained(folder / "model", state_dict=state)
    word_pieces(folder / "model")
    chosen = random.Random(3)
    for split, count in (("train", 200), ("test", 60)):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["premise", "hypothesis", "label"])
            for _ in range(count):
                kind = chosen.randrange(3)
                words = [f"w{chosen.randrange(9, 40)}" for _ in range(chosen.randint(1, 9))]
                words.insert(chosen.randrange(len(words)), f"w{3 * kind + chosen.randrange(3)}")
                writer.writerow([" ".join(words), f"w{chosen.randrange(9, 40)}", NAMES[kind]])
    return {
        "model": {"family": "hf_text", "path": str(folder / "model")},
        "data": {"name": "labelled", "path": str(folder), "sequence_length": 12, "validation": 30},
        "split": {"base": 1},
        "training": {"epochs": 7, "batch_size": 16, "optimizer": {"lr": 3e-3}},
        "evaluation": {"stages": False},
        # Sets of several shards, of several groups each.
        "snapshots": {"group_rows": 8, "shard_bytes": 40_000},
    }


def test_three_regimes_learn_pairs_and_their_exports_give_what_the_summary_says(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path, {**changes, "regimes": ["e2e", "lw", "segprop"]})
    assert main(["run", str(config)]) == 0
    summary = summary_of(tmp_path / "run")
    with (Path(changes["data"]["path"]) / "test.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for name, regime in summary["regimes"].items():
        target = tmp_path / "run" / "model" / name
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(target),
            AutoTokenizer.from_pretrained(target),
        )
        assert model.config.id2label == dict(enumerate(NAMES))
        given = tokenizer(
            [row["premise"] for row in rows],
            [row["hypothesis"] for row in rows],
            padding=True,
            truncation=True,
            max_length=12,
            return_tensors="pt",
        )
        with torch.no_grad():
            said = model.eval()(**given).logits.argmax(dim=1)
        right = sum(NAMES[index] == row["label"] for index, row in zip(said.tolist(), rows, strict=True))
        assert regime["final"]["metrics"]["accuracy"] == pytest.approx(right / len(rows))
        assert right / len(rows) > 0.6, name
        assert sum(regime["final"]["by_class"]["samples"]) == len(rows)
    assert summary["about"]["class_names"] == list(NAMES)


def test_a_stage_reads_rows_of_tokens_and_goes_on_where_it_stopped_with_the_same_bits(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    short = {**changes, "regimes": ["segprop"], "training.epochs": 2, "training.checkpoint_every_s": 1e-6}
    lab = Lab.make(tmp_path / "stored", {**short, "snapshots.mode": "always"})
    stage = "segprop/stage2-layer1"
    lab.prepare(stage)
    with pytest.raises(Interrupted):
        lab.run(stage, StopAfter(3))
    commit = lab.run(stage)
    resumed = digests(commit)
    assert commit.result["resumed"] == 1
    lab.forget(stage)
    assert digests(lab.run(stage)) == resumed
    data = lab.commit("data").read(TextDataResult)
    label = next(
        node.label for node in lab.prepared.plan.nodes if node.label.startswith("segprop/snapshot layer0 train")
    )
    assert lab.snapshots(label).spec.rows == data.tokens["train"] < 12 * data.rows["train"]
