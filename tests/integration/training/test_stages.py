"""What one stage changes, when it ends, and what it hands on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from running import DEVICE, Lab, copied, digests
from safetensors.torch import load_file

from cache_store.errors import ConfigError, TrainingDiverged
from cache_store.records.nodes import Commit
from workers import device
from workers.control import ThreadControl, Update
from workers.environment import WorkerEnvironment
from workers.models import single_samples
from workers.models.chain import State
from workers.specs import as_json, experiment
from workers.specs.capability import Capability
from workers.specs.tasks import StageTask
from workers.tasks import train
from workers.training import clocks, trainer
from workers.training.trainer import StageTrainer

#: Every kind of stage there is: with and without adapter, local head, frozen prefix, frozen intermediate blocks.
REGIMES: dict[str, Any] = {
    "e2e": {},
    "lw": {},
    "mapped": {"kind": "lw", "variant": "mapped"},
    "segprop": {},
    "frozen": {"kind": "segprop", "split": {"intermediate": "frozen"}},
    "ready": {"kind": "segprop", "split": {"train_base": False, "head": 1}},
    "never": {"kind": "segprop", "split": {"segment_size": 2}, "snapshots": {"mode": "never"}},
}


@dataclass
class Seen:
    """The states of every part a stage held, before and after it ran."""

    task: StageTask
    before: dict[str, State]
    after: dict[str, State]
    commit: Commit


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    lab = Lab.make(
        tmp_path_factory.mktemp("stages"),
        {"regimes": REGIMES, "training.epochs": 1, "training.commit": "last", "data.train_limit": 32},
    )
    found: list[Seen] = []

    def states(stage: StageTrainer) -> dict[str, State]:
        parts = {name: copied(part) for name, part in stage.path.module.parts.items()}
        if stage.inputs.prefix is not None:
            parts |= {f"prefix {name}": copied(part) for name, part in stage.inputs.prefix.parts.items()}
        return parts

    class Watched(StageTrainer):
        def run(self) -> Commit:
            before = states(self)
            commit = super().run()
            assert commit is not None
            found.append(Seen(self.task, before, states(self), commit))
            return commit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "StageTrainer", Watched)
        lab.run_all(("data", "model", "train", "materialize"))
    by_node = {item.commit.node: item for item in found}
    return {node.label: by_node[node.id] for node in lab.prepared.plan.nodes if node.kind == "train"}


def test_a_stage_changes_its_named_parameters_and_buffers_and_nothing_else(seen: dict[str, Seen]) -> None:
    kinds = set()
    for label, item in seen.items():
        for part, before in item.before.items():
            after = item.after[part]
            changed = {name for name in before if not torch.equal(before[name], after[name])}
            if part in item.task.trained or part in ("adapter", "aux"):
                assert changed == set(before), f"{label}: of {part}, these did not move: {set(before) - changed}"
                kinds.add(part if part in ("adapter", "aux") else "trained")
            else:
                # Neither weights nor the running statistics and counters of its batch normalization.
                assert changed == set(), f"{label}: {part} is frozen"
                assert any(name.endswith("num_batches_tracked") for name in before)
                kinds.add("prefix" if part.startswith("prefix") else "frozen")
    assert kinds == {"trained", "adapter", "aux", "frozen", "prefix"}, "the regimes cover all there is"


def test_a_stage_commits_what_it_trained_and_neither_adapter_nor_local_head(seen: dict[str, Seen]) -> None:
    for label, item in seen.items():
        parts = item.commit.result["parts"]
        assert tuple(parts) == item.task.trained, label
        assert set(item.commit.files) == {f"{part}.safetensors" for part in item.task.trained}, label


def test_with_snapshots_a_stage_holds_its_own_parts_only(seen: dict[str, Seen]) -> None:
    stage = seen["segprop/stage3-seg3"]
    assert list(stage.before) == ["seg3", "adapter", "head"]
    held = sum(tensor.nbytes for state in stage.before.values() for tensor in state.values())
    assert stage.commit.result["resident_bytes"] == held
    assert set(seen["never/stage2-seg2-seg3"].before) == {"prefix seg1", "seg2", "seg3", "adapter", "head"}


# -- exits ----------------------------------------------------------------------------------------------------

STAGE = "segprop/stage1-base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exits")


@pytest.mark.parametrize(
    ("exit_", "reason", "epochs", "steps"),
    [
        ({"target": 0.01}, "target", 1, 6),
        ({"plateau": 2, "min_delta": 1.0}, "plateau", 3, 18),
        ({"steps": 8}, "steps", 2, 8),
        ({}, "epochs", 4, 24),
    ],
)
def test_a_stage_ends_at_its_exit(folder: Path, exit_: dict[str, Any], reason: str, epochs: int, steps: int) -> None:
    lab = Lab.make(folder, {"training.exit": exit_, "training.epochs": 4})
    result = lab.run(STAGE).result
    assert (result["exit"], len(result["epochs"]), result["steps"]) == (reason, epochs, steps)


def test_best_commits_the_weights_of_the_best_epoch_and_last_those_of_the_last(folder: Path) -> None:
    # With a constant rate, a shorter stage is the beginning of a longer one. A high one makes accuracy jump.
    changes = {"training.optimizer.lr": 0.03, "seed": 2}
    best = Lab.make(folder, {**changes, "training.epochs": 4, "training.commit": "best"}).run(STAGE)
    last = Lab.make(folder, {**changes, "training.epochs": 4, "training.commit": "last"}).run(STAGE)
    assert best.result["best_epoch"] == best.result["committed_epoch"]
    assert last.result["committed_epoch"] == 3
    assert best.result["best_epoch"] < 3, "a seed is needed whose best epoch is not the last"
    accuracies = [epoch["validation_accuracy"] for epoch in best.result["epochs"]]
    assert accuracies[best.result["best_epoch"]] == max(accuracies)
    short = {"training.epochs": best.result["best_epoch"] + 1, "training.commit": "last"}
    assert digests(Lab.make(folder, {**changes, **short}).run(STAGE)) == digests(best)
    assert digests(last) != digests(best)


def test_the_schedule_starts_again_at_its_base_rate_with_every_stage(folder: Path) -> None:
    lab = Lab.make(
        folder,
        {"training.epochs": 3, "training.schedule": {"name": "cosine", "final": 0.01}, "training.optimizer.lr": 2e-3},
    )
    rates = []
    for label in (STAGE, "segprop/stage2-seg2"):
        result = lab.run(label).result
        rates.append([epoch["lr"] for epoch in result["epochs"]])
    assert rates[0] == rates[1]
    assert rates[0][0] > 0.75 * 2e-3
    steps = result["steps"]
    left = 0.5 * (1 + math.cos(math.pi * (steps - 1) / steps))
    assert rates[0][-1] == pytest.approx(2e-5 + 0.99 * 2e-3 * left), "one step before the final rate is reached"


def test_carried_optimizer_state_is_the_global_heads_alone(folder: Path) -> None:
    changes = {"split.head": 1, "training.head_optimizer": "carry"}
    carry, reset = Lab.make(folder, changes), Lab.make(folder, {"split.head": 1})
    first, second = "segprop/stage1-base", "segprop/stage2-seg2"
    assert digests(carry.run(first)) == digests(reset.run(first))
    assert digests(carry.run(second))["head"] != digests(reset.run(second))["head"]

    saved = load_file(Path(carry.store) / carry.commit(first).files["optimizer.safetensors"].path)
    assert {name.split("/")[0] for name in saved} == {"seg1", "seg4", "head"}
    order = carry.order(carry.node(second))
    environment = WorkerEnvironment(carry.storage, DEVICE, 1, carry.control)
    task = as_json.from_json(StageTask, order.task)
    stage = StageTrainer(task, order.parents, environment, environment.nodes.attempt("unused"))
    stage.state.restore(order.parents)
    for name, parameter in zip(stage.step.names, stage.path.parameters, strict=True):
        state = stage.step.optimizer.state.get(parameter, {})
        if name.startswith(("seg4/", "head/")):
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(value.cpu(), saved[f"{name}//{key}"]) for key, value in state.items())
        else:
            assert not state, f"{name} starts afresh"
    assert stage.step.optimizer.param_groups[0]["lr"] == task.train.optimizer.lr


# -- losses that are not finite ---------------------------------------------------------------------------------


@pytest.fixture
def exploding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the given step on the rate is 1e30."""
    step: list[int] = []
    plain = trainer.learning_rate

    def rate(base: float, schedule: experiment.ScheduleSpec, at: int, total: int) -> float:
        return 1e30 if at >= step[0] else plain(base, schedule, at, total)

    monkeypatch.setattr(trainer, "learning_rate", rate)
    return step


def test_divergence_names_its_step_and_keeps_the_last_good_checkpoint(
    folder: Path, exploding: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exploding.append(8)  # the loss of step 9 is the first that shows it
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 3600.0)  # a look between the two would save what is huge, but finite
    lab = Lab.make(folder, {"seed": 3, "training.checkpoint_every_s": 1e-6})
    with pytest.raises(TrainingDiverged, match=r"stage1-base: .* not finite at step 9 \(epoch 2, step 4 "):
        lab.run(STAGE)
    kept = lab.nodes.latest_checkpoint(lab.node(STAGE).id)
    assert kept is not None
    assert kept.position == (6, 1, 0)
    tensors = load_file(Path(lab.store) / kept.files["state.safetensors"].path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_weights_ruined_by_the_last_step_are_divergence_too(folder: Path, exploding: list[int]) -> None:
    exploding.append(5)  # the last step of the first epoch: only validation sees what it did
    lab = Lab.make(folder, {"seed": 4})
    with pytest.raises(TrainingDiverged, match=r"at step 5 \(epoch 1, step 6 "):
        lab.run(STAGE)


def test_snapshots_are_what_later_stages_read(seen: dict[str, Seen]) -> None:
    for label, item in seen.items():
        hits = item.commit.result["snapshot"]["hits"]
        assert (hits > 0) == (item.task.source == "snapshots"), label
        assert item.commit.result["snapshot"]["misses"] == 0


# -- orders of samples, and the device ----------------------------------------------------------------------------


def test_every_stage_of_a_regime_leaves_other_samples_out_and_first_stages_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: dict[str, frozenset[int]] = {}

    class Watched(StageTrainer):
        def run(self) -> Commit | None:
            order = self.inputs.order(0)
            assert sorted(order) == list(range(len(order)))
            left_out[self.task.name] = frozenset(order[self.inputs.per_epoch * self.train.batch_size :].tolist())
            return super().run()

    monkeypatch.setattr(train, "StageTrainer", Watched)
    changes = {"regimes": ["e2e", "segprop"], "training.epochs": 1, "data.train_limit": 44, "seed": 11}
    lab = Lab.make(folder, changes)
    for regime in lab.prepared.plan.regimes.values():
        for node in regime.stages:
            lab.run(lab.prepared.plan.node(node).label)
    assert all(len(samples) == 12 for samples in left_out.values())
    assert left_out.pop("e2e") == left_out["stage1-base"]
    assert len(set(left_out.values())) == len(left_out) > 2


@pytest.mark.parametrize(("flags", "emulated"), [({"avx512_bf16"}, None), ({"avx2"}, "bf16")])
@pytest.mark.skipif(DEVICE.type != "cpu", reason="what this machine's CPU can do is replaced")
def test_a_precision_that_the_device_emulates_is_named_before_training_and_in_the_commit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: set[str],
    emulated: str | None,
) -> None:
    monkeypatch.setattr(device, "cpu_capability", lambda: Capability("cpu", frozenset(flags)))
    device.name_emulated.cache_clear()
    lab = Lab.make(tmp_path, {"training.precision": "bf16", "training.epochs": 1, "data.train_limit": 32})
    commit = lab.run(STAGE)
    device.name_emulated.cache_clear()
    assert commit.result.get("emulated") == emulated
    named = [record for record in caplog.records if "no instructions" in record.getMessage()]
    assert len(named) == (emulated is not None)


# -- what is counted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "trained"), [(None, 192), (5, 176)])
def test_samples_are_counted_as_they_ran_where_the_last_batch_is_a_smaller_one(
    steps: int | None, trained: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 samples an epoch in batches of 40, 40 and 16; or five of the six batches of two epochs."""
    changes = {
        "snapshots.mode": "never",
        "training": {"epochs": 2, "batch_size": 40, "drop_last": False, "exit": {"steps": steps}},
    }
    lab = Lab.make(tmp_path, changes)
    lab.prepare("segprop/stage2-seg2")
    rates: list[float | None] = []

    class Watched(ThreadControl):
        def progress(self, update: Update) -> None:
            rates.extend([update.rate] if update.phase == "train" else [])

    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    monkeypatch.setattr(clocks.Clock, "seconds", lambda _: 2.0)
    result = lab.run("segprop/stage2-seg2", Watched()).result
    assert result["forwards"] == {"seg1": trained + 2 * 48}
    assert rates == [20.0, 40.0, 48.0, 20.0, 40.0, 48.0][:steps]
    assert [epoch["images_per_s"] for epoch in result["epochs"]] == [48.0, (trained - 96) / 2]


@pytest.mark.parametrize(("size", "works"), [(8, False), (16, True)])
def test_what_is_refused_of_a_last_batch_of_one_sample_is_what_torch_refuses(
    size: int, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "data.image_size": size,
        "data.train_limit": 33,
        "training": {"epochs": 1, "batch_size": 16, "drop_last": False},
        "regimes": ["e2e"],
    }
    if works:
        assert Lab.make(tmp_path, changes).run("e2e/e2e").result["steps"] == 3
        return
    with pytest.raises(ConfigError, match=r"training\.drop_last: false"):
        Lab.make(tmp_path, changes)
    monkeypatch.setattr(single_samples, "problems", lambda *_: iter(()))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        Lab.make(tmp_path, changes).run("e2e/e2e")
