"""`training.micro_batch: auto`: the most that the device holds, settled by the plan, the batch as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cache_store.errors import ConfigError
from orchestrator.config.devices import DEVICES, usable
from orchestrator.plan.graph import Node
from orchestrator.runs.prepare import Prepared, prepare
from workers.specs.as_json import from_json
from workers.specs.experiment import TrainSpec
from workers.specs.tasks import StageTask

ROOT = Path(__file__).parents[4]
LLAMA = [f"model.path={ROOT / 'tests' / 'data' / 'llama-3.1-8b'}", "data.name=stdlib", "resources.device=cuda"]
AUTO = "training.micro_batch=auto"


def planned(*overrides: str) -> Prepared:
    return prepare(ROOT / "configs" / "llama_segprop.yaml", [*LLAMA, *overrides])


def stages(prepared: Prepared) -> list[Node]:
    return [prepared.plan.node(node) for node in prepared.plan.regimes["segprop"].stages]


def training(node: Node) -> TrainSpec:
    return from_json(StageTask, node.task).train


def test_every_stage_takes_the_most_that_fits_and_the_batch_stays() -> None:
    found = stages(planned(AUTO, "resources.device_memory=80GiB"))
    limit = usable(80 * 2**30)
    for node in found:
        train = training(node)
        assert train.batch_size == 384
        assert isinstance(train.micro_batch, int)
        assert node.estimate.peak_bytes <= limit
    first, second = training(found[0]), training(found[1])
    assert 16 < first.micro < second.micro, "a stage that trains less holds more samples"
    passes = -(-384 // first.micro)
    assert first.micro == -(-384 // passes), "micro-batches of a step are as equal as can be"
    larger = -(-384 // (passes - 1))
    other = stages(planned(f"training.micro_batch={larger}"))[0]
    assert other.estimate.peak_bytes > limit


def test_a_named_accelerator_is_enough_and_other_memory_gives_other_nodes() -> None:
    large = stages(planned(AUTO, "resources.accelerator=H200"))
    small = stages(planned(AUTO, "resources.accelerator=H100"))
    assert training(large[0]).micro > training(small[0]).micro
    assert large[0].id != small[0].id
    assert large[0].estimate.peak_bytes <= DEVICES["h200"].usable_bytes
    again = stages(planned(AUTO, "resources.device_memory=80GiB"))
    assert [node.id for node in again] == [node.id for node in small]
    assert [training(node).micro for node in again] == [training(node).micro for node in small]


def test_a_number_and_auto_that_came_to_it_are_the_same_stage() -> None:
    auto = stages(planned(AUTO, "resources.device_memory=80GiB"))[0]
    size = training(auto).micro
    assert stages(planned(f"training.micro_batch={size}"))[0].id == auto.id
    assert dataclasses.replace(training(auto), micro_batch=None).micro == 384


def test_where_nothing_fits_single_samples_are_planned() -> None:
    found = stages(planned(AUTO, "resources.device_memory=8GiB"))
    assert training(found[0]).micro == 1


def test_auto_without_a_known_memory_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.runs.prepare.gpus", list)
    with pytest.raises(ConfigError, match=r"training\.micro_batch: auto: the memory .*resources\.device_memory"):
        planned(AUTO)


def test_images_refuse_auto_since_statistics_depend_on_it() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch: auto: batch normalization"):
        prepare(ROOT / "configs" / "quickstart.yaml", [AUTO])


def test_a_tied_embedding_leaves_room_for_more_samples() -> None:
    asked = [f"model.path={ROOT / 'tests' / 'data' / 'smollm2-135m'}", "regimes={e2e: {kind: e2e}}", AUTO]
    asked += ["training.batch_size=64", "resources.device=cuda", "resources.device_memory=5GiB"]

    def node(*overrides: str) -> Node:
        plan = prepare(ROOT / "configs" / "smollm2_segprop.yaml", [*asked, *overrides]).plan
        return plan.node(plan.regimes["e2e"].stages[0])

    assert training(node()).micro > training(node("model.config={tie_word_embeddings: false}")).micro
