"""Predictions: sizes that can be counted by hand, and shares that are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planning import CIFAR, plan_of, regime_node, small_config, small_plan

from orchestrator.config.load import load
from orchestrator.config.rates import Rates
from orchestrator.costs import formulas
from orchestrator.costs.formulas import StageInputs, epochs_to_run, frozen_estimate, train_estimate
from workers.data.splits import rows
from workers.domains.images.planning import IMAGES, split_rows
from workers.domains.planning import LoadSeconds, SplitRows
from workers.models.base import StageParts
from workers.models.outline import PartOutline
from workers.models.resnet.outline import resnet_outline as outline
from workers.specs.experiment import ExitSpec, ImageSpec, LoraSpec, OptimizerSpec, ResNetSpec, TrainSpec

RATES = Rates({"fp32": 1e9, "bf16": 1e9, "fp16": 1e9})
REPOSITORY = Path(__file__).parents[4]
ROWS = SplitRows(train=100, validation=10, test=5)


def part(name: str = "seg1", **changes: Any) -> PartOutline:
    figures: dict[str, Any] = {
        "units": (),
        "inputs": ((2, 4, 4),),
        "outputs": ((3, 4, 4),),
        "parameters": 1000,
        "buffer_elements": 10,
        "flops": 500,
        "saved_elements": 70,
    }
    return PartOutline(name=name, **{**figures, **changes})


def estimated(train: TrainSpec, *parts: PartOutline, trained: set[str], **options: Any) -> formulas.Estimate:
    stage = StageParts(parts, frozenset(trained), train, **options)
    return train_estimate(stage, StageInputs(ROWS, elements=32, item_bytes=4), RATES)


def test_memory_of_a_stage_counted_by_hand() -> None:
    train = TrainSpec(epochs=2, batch_size=8)
    found = estimated(train, part(), trained={"seg1"})
    weights, gradients, adam = 4 * 1010, 4 * 1000, 8 * 1000
    activations = 8 * (70 * 4 + 2 * 48 * 4 + 2 * 32 * 4)
    assert found.peak_bytes == weights + gradients + adam + activations
    assert (found.parameters, found.trainable) == (1000, 1000)
    assert found.flops == 2 * (100 * 1500 + 10 * 500)
    assert found.seconds == pytest.approx(formulas.TASK_SECONDS + found.flops / 1e9)


def test_what_lowers_and_raises_memory() -> None:
    base = estimated(TrainSpec(epochs=1, batch_size=8), part(), trained={"seg1"}).peak_bytes

    def peak(train: TrainSpec, trained: frozenset[str] = frozenset({"seg1"})) -> int:
        return estimated(train, part(), trained=set(trained)).peak_bytes

    assert peak(TrainSpec(epochs=1, batch_size=8, accumulate=4)) < base
    assert base - peak(TrainSpec(epochs=1, batch_size=8, optimizer=OptimizerSpec(name="sgd"))) == 4000
    plain = OptimizerSpec(name="sgd", momentum=0.0)
    assert base - peak(TrainSpec(epochs=1, batch_size=8, optimizer=plain)) == 8000
    assert base - peak(TrainSpec(epochs=1, batch_size=8), frozenset()) == 12000 + 8 * 70 * 4
    mixed = TrainSpec(epochs=1, batch_size=8, precision="bf16")
    assert base - peak(mixed) == 8 * (70 + 96) * 2 - 2000  # half the activations, copies of the weights


def test_checkpointing_keeps_inputs_and_one_part_and_runs_forward_twice() -> None:
    parts = [part(f"seg{index}", saved_elements=1000) for index in range(4)]
    trained = {item.name for item in parts}
    plain = estimated(TrainSpec(epochs=1, batch_size=8), *parts, trained=trained)
    saving = estimated(TrainSpec(epochs=1, batch_size=8, activation_checkpointing=True), *parts, trained=trained)
    assert plain.peak_bytes - saving.peak_bytes == 8 * 4 * (4000 - (1000 + 4 * 32))
    assert saving.flops - plain.flops == 100 * 4 * 500


def test_frozen_parts_after_a_trained_one_pass_gradients_on_without_keeping_any() -> None:
    train = TrainSpec(epochs=1, batch_size=8)
    found = estimated(train, part("seg1"), part("seg2"), part("head"), trained={"seg1", "head"})
    assert found.trainable == 2000
    assert found.flops == 100 * (1500 + 1000 + 1500) + 10 * 1500


def test_adapters_spare_the_gradients_of_the_matrices_they_stand_for() -> None:
    parts = (part("layer0"), part("layer1"), part("head"))
    trained = {item.name for item in parts}
    for lm_head, head in (("train", 1500), ("lora", 1000), ("frozen", 1000)):
        train = TrainSpec(epochs=1, batch_size=8, lora=LoraSpec(rank=4), lm_head=lm_head)
        assert estimated(train, *parts, trained=trained).flops == 100 * (1000 + 1000 + head) + 10 * 1500


def test_a_recomputed_prefix_costs_memory_and_work_in_every_epoch() -> None:
    train = TrainSpec(epochs=3, batch_size=8)
    without = estimated(train, part("seg2"), trained={"seg2"})
    found = estimated(train, part("seg2"), trained={"seg2"}, prefix=[part("seg1")], group_rows=16)
    assert found.peak_bytes - without.peak_bytes == 4 * 1010 + 16 * (32 + 4 * 48) * 4
    assert found.flops - without.flops == 3 * 110 * 500


def test_materializing_counts_bytes_and_one_pass() -> None:
    found = frozen_estimate(
        [part()],
        rows=40,
        batch_rows=16,
        precision="fp32",
        rates=RATES,
        stored_row_bytes=96,
        read_row_bytes=64,
    )
    assert (found.snapshot_bytes, found.flops, found.trainable) == (3840, 40 * 500, 0)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (TrainSpec(epochs=7, batch_size=10), 7),
        (TrainSpec(epochs=7, batch_size=10, exit=ExitSpec(steps=15)), 2),
        (TrainSpec(epochs=7, batch_size=30, exit=ExitSpec(steps=7)), 3),
        (TrainSpec(epochs=7, batch_size=30, drop_last=False, exit=ExitSpec(steps=8)), 2),
        (TrainSpec(epochs=7, batch_size=300, exit=ExitSpec(steps=3)), 3),
    ],
)
def test_step_limits_shorten_a_stage(train: TrainSpec, expected: int) -> None:
    assert epochs_to_run(train, 100) == expected


@pytest.mark.parametrize(
    "changes", [{}, {"validation": 7.0}, {"train_limit": 30, "test_limit": 3}, {"train_limit": 999}]
)
def test_split_sizes_are_those_of_the_workers(changes: dict[str, Any]) -> None:
    data = ImageSpec(name="digits", **changes)
    real = {name: len(found) for name, found in rows(data, 0, 101, 20).items()}
    found = split_rows(data, 101, 20)
    assert real == {"train": found.train, "validation": found.validation, "test": found.test}


def test_snapshot_bytes_of_a_plan_are_rows_times_the_boundary(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"training.precision": "bf16", "regimes": ["segprop"]})
    chain = outline(ResNetSpec(name="resnet18", stem="small"), 16, 10)
    sizes = [2 * int(np.prod(chain.boundaries[index][0])) * 45_000 for index in (1, 2)]
    found = [node.estimate.snapshot_bytes for node in plan.nodes if node.label.endswith("train view 0")]
    assert found[:2] == sizes


def test_published_memory_is_predicted_within_a_quarter(tmp_path: Path) -> None:
    """ResNet-50, 224x224, batch 256, AMP; GiB, as the source divides by 1024^3. The stages' inputs are stored."""
    config = load(
        REPOSITORY / "configs" / "resnet50_cifar10.yaml",
        ["snapshots.mode=always", "snapshots.budget=null"],
    )
    plan = plan_of(config)
    e2e = regime_node(plan, "e2e", "e2e").estimate.peak_bytes / 2**30
    assert e2e == pytest.approx(11.29, rel=0.25)
    published = {"stage1-base": 7.09, "stage2-seg2": 4.48, "stage3-seg3": 3.47, "stage4-seg4": 2.45}
    found = {name: regime_node(plan, "segprop", name).estimate.peak_bytes / 2**30 for name in published}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found["stage1-base"] == pytest.approx(7.09, rel=0.25)


def test_reading_snapshots_needs_less_memory_and_work_than_recomputing(tmp_path: Path) -> None:
    stored, recomputed = (small_plan(tmp_path, {"snapshots.mode": mode}) for mode in ("always", "never"))
    for name in ("stage2-seg2", "stage3-seg3", "stage4-seg4"):
        with_sets = regime_node(stored, "segprop", name).estimate
        without = regime_node(recomputed, "segprop", name).estimate
        assert with_sets.peak_bytes < without.peak_bytes
        assert with_sets.flops < without.flops


def test_loading_counts_beside_computing_on_a_cpu_and_hides_behind_it_on_a_gpu() -> None:
    stage = StageParts((part(),), frozenset({"seg1"}), TrainSpec(epochs=2, batch_size=8))
    inputs = StageInputs(ROWS, elements=32, item_bytes=4, load=LoadSeconds(train=0.01, evaluate=0.004))
    loading, computing = 2 * (100 * 0.01 + 10 * 0.004), 2 * (100 * 1500 + 10 * 500) / 1e9

    def seconds(**how: Any) -> float:
        return train_estimate(stage, inputs, Rates(RATES.flops_per_s, **how)).seconds - formulas.TASK_SECONDS

    assert seconds() == pytest.approx(computing + loading)
    assert seconds(threads=4) == pytest.approx(computing + loading / 4)
    assert seconds(threads=4, loads_ahead=True) == pytest.approx(loading / 4)
    assert seconds(threads=10**6, loads_ahead=True) == pytest.approx(computing)


@pytest.mark.parametrize("level", ["paper", "light", "none"])
@pytest.mark.parametrize("side", [16, 32, 224])
def test_a_view_takes_about_what_was_measured(level: Any, side: int) -> None:
    measured = json.loads((REPOSITORY / "benchmarks" / "results" / "augment.json").read_text())
    found = IMAGES.load_seconds(ImageSpec(name="cifar10", augment=level, image_size=side))
    images_per_s = measured["settings"]["threads"] / found.train
    assert images_per_s == pytest.approx(measured["results"][f"{level} {side}"]["ours"]["median"], rel=0.25)
    assert found.evaluate == IMAGES.load_seconds(ImageSpec(name="cifar10", augment="none", image_size=side)).train


def test_the_published_run_is_predicted_with_the_augmentation_it_waits_for() -> None:
    plan = plan_of(load(REPOSITORY / "configs" / "resnet50_cifar10.yaml", ["evaluation.every=null"]))
    total = sum(node.estimate.seconds for node in plan.nodes)
    computing = sum(node.estimate.flops for node in plan.nodes) / Rates.nominal("cuda").flops_per_s["fp16"]
    assert total > 2 * computing
    assert total > 25 * 3600
    # Eight threads beside the GPU, one view of every image in each of 400 epochs.
    e2e = regime_node(plan, "e2e", "e2e").estimate.seconds
    assert e2e == pytest.approx(400 * (45_000 / 203 + 5_000 / 468) / 8, rel=0.03)


def test_stages_that_read_snapshots_load_no_images(tmp_path: Path) -> None:
    plans = [
        small_plan(tmp_path, {"snapshots.mode": "always", "data.image_size": 16, "data.augment": augment})
        for augment in ("paper", "none")
    ]
    stage1, stage2, made = (
        [pick(plan).estimate.seconds for plan in plans]
        for pick in (
            lambda plan: regime_node(plan, "segprop", "stage1-base"),
            lambda plan: regime_node(plan, "segprop", "stage2-seg2"),
            lambda plan: next(node for node in plan.nodes if node.label.endswith("train view 0")),
        )
    )
    assert stage1[0] > stage1[1] + 4 * 45_000 * 60e-6
    assert made[0] > made[1] + 45_000 * 60e-6
    assert stage2[0] == stage2[1]


def test_every_node_has_a_time(tmp_path: Path) -> None:
    plan = plan_of(small_config(tmp_path), CIFAR)
    assert all(node.estimate.seconds > 0 for node in plan.nodes)
