"""The configurations of large models are planned from a config.json alone, on data that every machine has."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.runs.dry_run import print_plan
from orchestrator.runs.prepare import Prepared, prepare

ROOT = Path(__file__).parents[4]
CASES = {"llama_segprop": ("llama-3.1-8b", 18, 32), "mistral_nemo_segprop": ("mistral-nemo-12b", 25, 40)}


def planned(name: str, *overrides: str) -> Prepared:
    folder = ROOT / "tests" / "data" / CASES[name][0]
    return prepare(ROOT / "configs" / f"{name}.yaml", [f"model.path={folder}", "data.name=stdlib", *overrides])


@pytest.fixture(scope="module")
def llama() -> Prepared:
    return planned("llama_segprop")


@pytest.mark.parametrize("name", list(CASES))
def test_every_stage_shows_parameters_memory_states_and_snapshots(name: str) -> None:
    prepared = planned(name)
    _, base, layers = CASES[name]
    stages = [prepared.plan.node(node) for node in prepared.plan.regimes["segprop"].stages]
    assert [stage.task["name"] for stage in stages] == [
        "stage1-base",
        *(f"stage{index + 2}-layer{base + index}" for index in range(layers - 2 - base)),
    ]
    for stage in stages:
        found = stage.estimate
        # bfloat16 weights, gradients and two moments of what trains.
        assert found.optimizer_bytes == 4 * found.trainable
        assert 2 * found.parameters + 6 * found.trainable < found.peak_bytes
    stream = io.StringIO()
    print_plan(prepared, stream)
    text = stream.getvalue()
    for word in ("optimizer", "peak memory", "snapshots", "tokens to train on", "no weights there"):
        assert word in text
    print(text)


def test_parameters_are_those_of_the_published_model(llama: Prepared) -> None:
    model = next(node for node in llama.plan.nodes if node.kind == "model")
    assert model.estimate.parameters == 8_030_261_248
    layer, lm_head, norm = 218_112_000, 525_336_576, 4096
    second = llama.plan.node(llama.plan.regimes["segprop"].stages[1]).estimate
    assert second.trainable == 3 * layer + lm_head + norm


def test_snapshots_take_two_bytes_a_value_of_every_token(llama: Prepared) -> None:
    rows = llama.data.rows  # type: ignore[union-attr]
    stored = {
        node.task["split"]: node.estimate.snapshot_bytes
        for node in llama.plan.nodes
        if node.label.startswith("segprop/snapshot layer17")
    }
    assert stored == {split: rows[split] * 1024 * 4096 * 2 for split in ("train", "validation")}


def test_a_frozen_head_and_8_bit_states_lower_what_a_stage_needs(llama: Prepared) -> None:
    second = llama.plan.regimes["segprop"].stages[1]
    full = llama.plan.node(second).estimate
    other = planned("llama_segprop", "training.lm_head=frozen")
    frozen = other.plan.node(other.plan.regimes["segprop"].stages[1]).estimate
    assert full.trainable - frozen.trainable == 525_336_576
    assert full.peak_bytes - frozen.peak_bytes > 3e9


def test_a_mixture_of_experts_is_planned_with_all_its_experts() -> None:
    data = ROOT / "tests" / "data"
    plan = prepare(ROOT / "configs" / "moe.yaml", [f"model.path={data / 'olmoe-1b-7b'}", "data.name=stdlib"]).plan
    model = next(node for node in plan.nodes if node.kind == "model")
    assert model.estimate.parameters == 6_919_161_856
    stages = [plan.node(node).estimate for node in plan.regimes["segprop"].stages]
    # Two layers of 64 experts, and the head's layer with norm and LM head.
    layer, lm_head, norm = 64 * 3 * 2048 * 1024 + 4 * 2048**2 + 64 * 2048 + 4 * 2048, 50304 * 2048, 2048
    assert stages[1].trainable == 3 * layer + lm_head + norm
    assert 35e9 < stages[0].peak_bytes < 45e9


def test_bert_on_mnli_is_planned_at_its_published_size(tmp_path: Path) -> None:
    rows = {"premise": ["one two"] * 40, "hypothesis": ["three"] * 40, "label": [number % 3 for number in range(40)]}
    for name in ("train-00000-of-00001", "validation_matched-00000-of-00001", "validation_mismatched-00000-of-00001"):
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    model = ROOT / "tests" / "data" / "bert-base-uncased"
    given = [f"model.path={model}", f"data.path={tmp_path}", "data.validation=8"]
    prepared = prepare(ROOT / "configs" / "bert_mnli.yaml", given)
    plan = prepared.plan
    assert next(node for node in plan.nodes if node.kind == "model").estimate.parameters == 109_484_547
    assert prepared.data.rows == {"train": 32, "validation": 8, "test": 40}  # type: ignore[union-attr]
    assert [plan.node(node).task["name"] for node in plan.regimes["segprop"].stages] == [
        "stage1-base",
        "stage2-layer4-layer5",
        "stage3-layer6-layer7",
        "stage4-layer8-layer9",
        "stage5-layer10",
    ]
    stream = io.StringIO()
    print_plan(prepared, stream)
    said = " ".join(stream.getvalue().split())  # where its lines break hangs on the length of paths
    for word in ("bert, 12 layers", "no weights there", "3 classes", "bfloat16"):
        assert word in said
