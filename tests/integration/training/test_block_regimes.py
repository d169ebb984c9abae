"""BAdam and LISA on images: against an ordinary loop, killed and resumed, and what they hold at one time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_turns import OrdinaryTurns
from running import DEVICE, Lab, StopAfter, digests
from safetensors.torch import load_file
from torch.nn import functional as F

from cache_store.errors import Interrupted
from cache_store.snapshots.store import SnapshotStore
from workers.data.images.source import ImageSource
from workers.models.resnet import parts as resnet
from workers.seeds import derive_seed
from workers.specs import as_json
from workers.specs.data_results import ImageDataResult
from workers.specs.tasks import StageTask
from workers.training import clocks
from workers.training.schedules import learning_rate
from workers.training.shuffle import epoch_order

#: 10 steps an epoch, 20 in all: turns of 3 steps, and one of 2.
STEPS = {"data.train_limit": 168, "data.views": 2, "training.commit": "last"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "badam, ascending": ("badam", {"steps": 3}),
    "badam, descending, clipped, cosine, accumulated": ("badam", {"steps": 3, "order": "descending"}),
    "badam, random": ("badam", {"steps": 3, "order": "random"}),
    "lisa": ("lisa", {"steps": 3, "count": 2}),
    "lisa, one at a time, bf16, channels_last": ("lisa", {"steps": 3, "count": 1}),
}
TRAINING: dict[str, dict[str, Any]] = {
    "badam, descending, clipped, cosine, accumulated": {
        "training.clip": 0.5,
        "training.accumulate": 2,
        "training.schedule": {"name": "cosine", "warmup": 0.1},
    },
    "lisa, one at a time, bf16, channels_last": {"training.precision": "bf16", "training.channels_last": True},
}


def changes(case: str) -> tuple[str, dict[str, Any]]:
    kind, blocks = CASES[case]
    return kind, {**STEPS, **TRAINING.get(case, {}), "regimes": {kind: {"blocks": blocks}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


def ordinary_loop(
    task: StageTask, initial: dict[str, torch.Tensor], images: ImageSource, part_of: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Torch alone, but for the batches: torchvision's model in training mode throughout. `part_of`: tensor -> part."""
    train, seed = task.train, task.experiment.seed
    assert task.schedule is not None
    model = resnet.build_torchvision(task.experiment.model, task.experiment.classes)
    model.load_state_dict(initial)
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    model.to(device=DEVICE, memory_format=layout)
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(part_of[name], []).append(parameter)
    turns = OrdinaryTurns(task.schedule, (seed, "stage", task.name), parts, train.optimizer)
    per_epoch, size = images.rows // train.batch_size, train.batch_size
    total = per_epoch * train.epochs
    torch.manual_seed(derive_seed(seed, "stage", task.name))  # dropout
    model.train()
    for step in range(total):
        epoch, within = divmod(step, per_epoch)
        rows = epoch_order(seed, epoch, images.rows)[within * size : (within + 1) * size]
        batch = images.batch(rows, epoch % task.experiment.data.views).to(device=DEVICE, memory_format=layout)
        labels = images.labels[torch.from_numpy(rows)].to(DEVICE)
        turns.begin(step)
        for part, targets in zip(batch.chunk(train.accumulate), labels.chunk(train.accumulate), strict=True):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=train.precision == "bf16"):
                logits = model(part)
            (F.cross_entropy(logits.float(), targets) / train.accumulate).backward()
        if train.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        turns.step(learning_rate(train.optimizer.lr, train.schedule, step, total))
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_parts_that_take_turns_equal_an_ordinary_loop_bit_for_bit_over_20_steps(folder: Path, case: str) -> None:
    kind, changed = changes(case)
    lab = Lab.make(folder, changed)
    label = f"{kind}/{kind}"
    assert lab.run(label).result["steps"] == 20
    task = as_json.from_json(StageTask, lab.node(label).task)
    initial = load_file(Path(lab.store) / lab.commit("model").files["state.safetensors"].path)
    images = ImageSource(task.experiment, lab.commit("data").read(ImageDataResult), SnapshotStore(lab.storage), "train")
    committed = lab.weights(label)
    part_of = {name.partition("/")[2]: name.partition("/")[0] for name in committed}
    expected = ordinary_loop(task, initial, images, part_of)
    trained = {name.partition("/")[2]: tensor for name, tensor in committed.items()}
    assert trained.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []
    weights = [name for name in initial if name.endswith("weight")]
    moved = {part_of[name] for name in weights if not torch.equal(trained[name], initial[name])}
    assert "head" in moved
    assert len(moved) == 5 or task.schedule.order == "sampled", "in a cycle every part has a turn"


def test_a_turn_that_outlasts_the_stage_trains_one_part_and_no_other(folder: Path) -> None:
    lab = Lab.make(folder, {**STEPS, "regimes": {"badam": {"blocks": {"steps": 1000, "order": "descending"}}}})
    lab.run("badam/badam")
    initial = load_file(Path(lab.store) / lab.commit("model").files["state.safetensors"].path)
    weights = {name: tensor for name, tensor in lab.weights("badam/badam").items() if name.endswith(("weight", "bias"))}
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, initial[name.partition("/")[2]])}
    assert {name.partition("/")[0] for name in moved} == {"head"}


@pytest.mark.parametrize("case", ["badam, random", "lisa"])
def test_a_stage_stopped_inside_a_turn_and_at_its_end_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    kind, changed = changes(case)
    label = f"{kind}/{kind}"
    reference = Lab.make(folder, changed)
    reference.prepare(label)
    other = reference.linked_copy(tmp_path)
    if other.nodes.commit_of(other.node(label).id):
        other.forget(label)
    whole = reference.run(label)
    # After 4 steps (one into the second turn), 9 (the third turn's last is done) and 11.
    for looks in (4, 5, 2):
        with pytest.raises(Interrupted):
            other.run(label, StopAfter(looks))
    commit = other.run(label)
    assert commit.result["resumed"] == 3
    assert digests(commit) == digests(whole)
    assert [epoch["train_loss"] for epoch in commit.result["epochs"]] == [
        epoch["train_loss"] for epoch in whole.result["epochs"]
    ]


@pytest.mark.parametrize(("kind", "always"), [("badam", set()), ("lisa", {"head"})])
def test_a_checkpoint_holds_the_state_of_what_has_its_turn_and_all_weights(
    folder: Path, tmp_path: Path, kind: str, always: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    lab = Lab.make(tmp_path, {**STEPS, "regimes": {kind: {"blocks": {"steps": 3}}}})
    label = f"{kind}/{kind}"
    states = []
    for looks in (5, 1):  # two steps into the second turn; at its end
        with pytest.raises(Interrupted):
            lab.run(label, StopAfter(looks))
        newest = lab.nodes.checkpoints(lab.node(label).id)[0]
        found = load_file(Path(lab.store) / newest.files["state.safetensors"].path)
        names = [name.split("/") for name in found]
        assert {name[1] for name in names if name[0] == "model"} == {"seg1", "seg2", "seg3", "seg4", "head"}
        states.append({name[1] for name in names if name[0] == "optimizer"})
    inside, at_the_end = states
    assert inside > always
    assert len(inside - always) == (1 if kind == "badam" else 2)
    assert at_the_end == always, "what had its turn leaves no state behind"
