"""The E2E regime against a loop in plain PyTorch, and SegProp with everything in its base against E2E."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DEVICE, Lab, digests
from safetensors.torch import load_file
from torch.nn import functional as F

from cache_store.snapshots.store import SnapshotStore
from workers.data.images.source import ImageSource
from workers.models.resnet import parts as resnet
from workers.seeds import derive_seed
from workers.specs import as_json, experiment
from workers.specs.data_results import ImageDataResult
from workers.specs.tasks import StageTask
from workers.training.shuffle import epoch_order

#: 10 steps an epoch, 20 in all.
STEPS = {"data.train_limit": 168, "data.views": 2, "training.commit": "last", "regimes": ["e2e"]}

CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "clip, accumulation, cosine with warm-up": {
        "training.clip": 0.5,
        "training.accumulate": 2,
        "training.schedule": {"name": "cosine", "warmup": 0.1, "final": 0.05},
    },
    "sgd, linear, label smoothing": {
        "training.optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        "training.schedule": {"name": "linear"},
        "training.label_smoothing": 0.1,
    },
    "bf16, channels_last, linear classifier": {
        "training.precision": "bf16",
        "training.channels_last": True,
        "model.classifier": "linear",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


def rate(train: experiment.TrainSpec, step: int, total: int) -> float:
    base, schedule = train.optimizer.lr, train.schedule
    warm = round(schedule.warmup * total)
    if step < warm:
        return base * step / warm
    share = (step - warm) / (total - warm)
    decay = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[schedule.name]
    return base * (schedule.final + (1 - schedule.final) * decay) if schedule.name != "constant" else base


def plain_loop(task: StageTask, initial: dict[str, torch.Tensor], images: ImageSource) -> dict[str, torch.Tensor]:
    """Torch alone: an ordinary model, optimizer and loop over the same batches."""
    train, seed = task.train, task.experiment.seed
    model = resnet.build_torchvision(task.experiment.model, task.experiment.classes)
    model.load_state_dict(initial)
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    model.to(device=DEVICE, memory_format=layout)
    spec = train.optimizer
    optimizer: torch.optim.Optimizer
    if spec.name == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
            fused=True,
        )
    per_epoch = images.rows // train.batch_size
    total, size = per_epoch * train.epochs, train.batch_size
    torch.manual_seed(derive_seed(seed, "stage", task.name))  # dropout
    model.train()
    for step in range(total):
        epoch, within = divmod(step, per_epoch)
        rows = epoch_order(seed, epoch, images.rows)[within * size : (within + 1) * size]
        batch = images.batch(rows, epoch % task.experiment.data.views).to(device=DEVICE, memory_format=layout)
        labels = images.labels[torch.from_numpy(rows)].to(DEVICE)
        for part, targets in zip(batch.chunk(train.accumulate), labels.chunk(train.accumulate), strict=True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=train.precision == "bf16"):
                logits = model(part)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=train.label_smoothing)
            (loss / train.accumulate).backward()
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(train, step, total)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_the_e2e_regime_equals_a_plain_loop_bit_for_bit_over_20_steps(folder: Path, case: str) -> None:
    lab = Lab.make(folder, {**STEPS, **CASES[case]})
    commit = lab.run("e2e/e2e")
    assert commit.result["steps"] == 20
    task = as_json.from_json(StageTask, lab.node("e2e/e2e").task)
    initial = load_file(Path(lab.store) / lab.commit("model").files["state.safetensors"].path)
    data = lab.commit("data").read(ImageDataResult)
    images = ImageSource(task.experiment, data, SnapshotStore(lab.storage), "train")
    expected = plain_loop(task, initial, images)
    trained = {name.partition("/")[2]: tensor for name, tensor in lab.weights("e2e/e2e").items()}
    assert trained.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []
    assert not torch.equal(trained["conv1.weight"], initial["conv1.weight"])


def test_segprop_with_all_blocks_in_its_base_equals_e2e(folder: Path) -> None:
    # Dropout is seeded by the stage's name, which differs.
    lab = Lab.make(folder, {**STEPS, "regimes": ["e2e", "segprop"], "split.base": 4, "model.dropout": 0.0})
    assert [node.label for node in lab.prepared.plan.nodes if node.kind == "train"] == [
        "e2e/e2e",
        "segprop/stage1-base",
    ]
    assert digests(lab.run("segprop/stage1-base")) == digests(lab.run("e2e/e2e"))


def test_activation_checkpointing_gives_the_same_weights_and_running_statistics(folder: Path) -> None:
    changes = {**STEPS, "data.train_limit": 48}
    plain = Lab.make(folder, changes)
    checkpointed = Lab.make(folder, {**changes, "training.activation_checkpointing": True})
    plain.run("e2e/e2e")
    checkpointed.run("e2e/e2e")
    first, second = plain.weights("e2e/e2e"), checkpointed.weights("e2e/e2e")
    assert any(name.endswith("running_var") for name in first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
