"""A language model's E2E stage against a loop in plain PyTorch over transformers' own model and loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import LLAMA, imported, lm_changes, plain_names, write_chat, write_tokenizer
from running import DEVICE, Lab, digests
from transformers import AutoConfig, AutoModelForCausalLM

from cache_store.snapshots.store import SnapshotStore
from workers.data.text.source import TextBatch, TextSource
from workers.specs import as_json, experiment
from workers.specs.data_results import TextDataResult
from workers.specs.language import CausalLMSpec
from workers.specs.tasks import StageTask
from workers.training.shuffle import epoch_order

#: 10 steps an epoch, 20 in all. Adam divides by the root of the second moment: a gradient that is nothing but the
#: rounding of another order of sums would move a weight by a whole step either way. A larger epsilon keeps such
#: noise as small as it is.
STEPS = {
    "data.train_limit": 80,
    "training.epochs": 2,
    "training.optimizer": {"lr": 5e-3, "eps": 1e-4},
    "regimes": ["e2e"],
}

CASES: dict[str, dict[str, Any]] = {
    "packed, documents apart": {},
    "packed, documents seeing each other": {"data.isolate": False},
    "a sample a document, padded": {"data.pack": False},
    "packed, micro-batches of 3, 3 and 2, linear with warm-up, clipped": {
        "training.micro_batch": 3,
        "training.clip": 0.5,
        "training.schedule": {"name": "linear", "warmup": 0.1},
    },
    "tied, micro-batches of 3, 3 and 2, clipped": {
        "model.config": {**LLAMA, "tie_word_embeddings": True},
        "training.micro_batch": 3,
        "training.clip": 0.5,
    },
    "chats, micro-batches of unequal numbers of targets": {"chat": True, "training.micro_batch": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


def changes(folder: Path, case: str) -> dict[str, Any]:
    own = dict(CASES[case])
    if own.pop("chat", False):
        write_chat(folder / "chat.jsonl", 120)
        own |= {
            "model.tokenizer": str(write_tokenizer(folder / "tokenizer")),
            "data.name": "chat",
            "data.path": str(folder / "chat.jsonl"),
            "data.sequence_length": 96,
        }
    return {**lm_changes(folder), **STEPS, **own}


def rate(train: experiment.TrainSpec, step: int, total: int) -> float:
    base, schedule = train.optimizer.lr, train.schedule
    warm = round(schedule.warmup * total)
    if step < warm:
        return base * step / warm
    return base if schedule.name == "constant" else base * (1 - (step - warm) / (total - warm))


def labelled(batch: TextBatch) -> torch.Tensor:
    """Labels as transformers takes them: -100 where nothing is to be predicted."""
    labels = torch.full_like(batch.ids, -100)
    labels.view(-1)[batch.where + 1] = batch.targets
    return labels


def plain_loop(task: StageTask, initial: dict[str, torch.Tensor], texts: TextSource) -> tuple[Any, list[float]]:
    """Transformers and torch alone: an ordinary model with its own loss, optimizer and loop over the same samples;
    the trained model and the mean loss of every micro-batch."""
    train, seed = task.train, task.experiment.seed
    assert isinstance(task.experiment.model, CausalLMSpec)
    config = dict(task.experiment.model.config or {})
    kind = AutoConfig.for_model(config.pop("model_type"), **config)
    model: Any = AutoModelForCausalLM.from_config(kind)  # type: ignore[no-untyped-call]
    model.load_state_dict(initial)
    model.to(DEVICE).train()
    spec = train.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
    )
    per_epoch, losses = texts.rows // train.batch_size, []
    total, size = per_epoch * train.epochs, train.batch_size
    for step in range(total):
        epoch, within = divmod(step, per_epoch)
        rows = epoch_order(seed, epoch, texts.rows)[within * size : (within + 1) * size]
        batches = [texts.batch(rows[first : first + train.micro]) for first in range(0, size, train.micro)]
        targets = sum(len(batch.targets) for batch in batches)
        for batch in batches:
            # Without a mask, transformers keeps documents apart where positions restart.
            mask = None if batch.attention_mask is None else batch.attention_mask.long()
            given = {
                "input_ids": batch.ids,
                "position_ids": batch.position_ids,
                "attention_mask": mask,
                "labels": labelled(batch),
                "num_items_in_batch": torch.tensor(targets),
            }
            on_device = {name: None if value is None else value.to(DEVICE) for name, value in given.items()}
            output = model(**on_device, use_cache=False)
            output.loss.backward()
            losses.append(output.loss.item() * targets / len(batch.targets))
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(train, step, total)
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


@pytest.mark.parametrize("case", CASES)
def test_the_e2e_regime_equals_a_plain_transformers_loop_over_20_steps(folder: Path, case: str) -> None:
    lab = Lab.make(folder, changes(folder, case))
    commit = lab.run("e2e/e2e")
    assert commit.result["steps"] == 20
    task = as_json.from_json(StageTask, lab.node("e2e/e2e").task)
    texts = TextSource(task.experiment, lab.commit("data").read(TextDataResult), SnapshotStore(lab.storage), "train")
    if "micro" in case:
        counts = texts.targets
        assert len(set(counts.tolist())) > 1, "the micro-batches of a step differ in targets"
    initial = imported(lab)
    model, losses = plain_loop(task, initial, texts)
    trained = plain_names(lab.weights("e2e/e2e"))
    expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    assert trained.keys() == expected.keys()
    assert commit.result["trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is case.startswith("tied")
    # Not the same bits: transformers makes the logits of every position, and sums gradients in another order.
    moved = max(float((expected[name] - initial[name]).abs().max()) for name in expected)
    apart = max(float((expected[name] - trained[name]).abs().max()) for name in expected)
    assert moved > 0.02
    # A device sums in yet another order.
    assert apart < (2e-5 if DEVICE.type == "cpu" else 5e-5) * moved
    assert losses[-1] < losses[0]


def test_the_loss_it_reports_is_that_of_the_plain_loop(folder: Path) -> None:
    case = "a sample a document, padded"
    lab = Lab.make(folder, {**changes(folder, case), "training.batch_size": 80, "training.epochs": 1})
    reported = lab.run("e2e/e2e").result["epochs"][0]["train_loss"]
    task = as_json.from_json(StageTask, lab.node("e2e/e2e").task)
    texts = TextSource(task.experiment, lab.commit("data").read(TextDataResult), SnapshotStore(lab.storage), "train")
    _, (loss,) = plain_loop(task, imported(lab), texts)
    assert math.isclose(reported, loss, rel_tol=1e-6)


def test_segprop_with_all_layers_in_its_base_equals_e2e(folder: Path) -> None:
    made = {**lm_changes(folder), "split": {"base": 3, "head": 0}, "regimes": ["e2e", "segprop"]}
    lab = Lab.make(folder, made)
    assert [node.label for node in lab.prepared.plan.nodes if node.kind == "train"] == [
        "e2e/e2e",
        "segprop/stage1-base",
    ]
    assert digests(lab.run("segprop/stage1-base")) == digests(lab.run("e2e/e2e"))


def test_activation_checkpointing_gives_the_same_weights(folder: Path) -> None:
    made = {**lm_changes(folder), "regimes": ["e2e"]}
    plain = Lab.make(folder, made).run("e2e/e2e")
    checkpointed = Lab.make(folder, {**made, "training.activation_checkpointing": True}).run("e2e/e2e")
    assert plain.node != checkpointed.node
    assert digests(plain) == digests(checkpointed)
