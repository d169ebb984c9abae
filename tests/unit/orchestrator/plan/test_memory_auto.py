"""`memory: auto`: the fastest places that device and host have room for, settled by the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_store.errors import ConfigError
from orchestrator.config.compatibility import compatible
from orchestrator.config.devices import usable
from orchestrator.plan.graph import Node
from orchestrator.runs.prepare import Prepared, prepare
from workers.specs.as_json import from_json
from workers.specs.memory import MemorySpec
from workers.specs.tasks import StageTask

ROOT = Path(__file__).parents[4]
LLAMA = [f"model.path={ROOT / 'tests' / 'data' / 'llama-3.1-8b'}", "data.name=stdlib", "resources.device=cuda"]
#: One stage in front of few others, beside a host with room for them.
SHORT = ["split.base=28", "training.micro_batch=4", "resources.host_memory=200GB"]


def planned(*overrides: str) -> Prepared:
    return prepare(ROOT / "configs" / "llama_segprop.yaml", [*LLAMA, *SHORT, *overrides])


def stages(prepared: Prepared) -> list[Node]:
    return [prepared.plan.node(node) for node in prepared.plan.regimes["segprop"].stages]


def tiers(node: Node) -> MemorySpec:
    return from_json(StageTask, node.task).tiers


def test_every_stage_gets_places_that_fit_and_none_that_it_does_not_need() -> None:
    found = stages(planned("memory=auto", "resources.device_memory=24GiB"))
    limit = usable(24 * 2**30)
    for node in found:
        assert node.estimate.peak_bytes <= limit
        assert not tiers(node).open
    first, last = tiers(found[0]), tiers(found[-1])
    assert first.optimizer == "host", "4 bytes for each of 7.6 B parameters"
    assert last == MemorySpec(optimizer="device", frozen="device", activations="keep")
    assert not found[-1].estimate.link_bytes
    # What it came to and the same settings by name are the same stage.
    by_name = [f"memory.{key}={getattr(first, key)}" for key in ("optimizer", "frozen", "activations")]
    assert stages(planned(*by_name))[0].id == found[0].id


def test_a_large_device_keeps_everything_and_its_stages_are_those_without_the_section() -> None:
    auto = stages(planned("memory=auto", "resources.device_memory=141GiB"))
    assert [tiers(node).optimizer for node in auto] == ["device", "device", "device"]
    assert [node.id for node in auto] == [node.id for node in stages(planned())]


def test_an_entry_that_is_set_stays() -> None:
    asked = ["memory.optimizer=host", "memory.frozen=auto", "resources.device_memory=141GiB"]
    assert {(tiers(node).optimizer, tiers(node).frozen) for node in stages(planned(*asked))} == {("host", "device")}


def test_files_are_chosen_only_where_a_folder_is_named_and_the_host_is_too_small() -> None:
    asked = ["memory.optimizer=auto", "resources.device_memory=24GiB", "resources.host_memory=50GB"]
    with pytest.raises(ConfigError, match=r"memory: auto: segprop/stage1-base needs at least .* of the host's memory"):
        planned(*asked)
    found = stages(planned(*asked, "memory.disk=/nvme"))[0]
    assert tiers(found).optimizer == "disk"
    assert (found.estimate.host_bytes or 0) <= 50e9


def test_where_nothing_fits_the_plan_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError,
        match=r"memory: auto: segprop/stage1-base needs at least [\d.]+ GB of the device, which has 11\.1 GB .*"
        r"optimizer host, frozen host, activations \w+, micro-batches of 4.*split\.base_segment_size",
    ):
        planned("memory=auto", "resources.device_memory=12GiB")


def test_an_unknown_device_is_refused_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.runs.prepare.gpus", list)
    with pytest.raises(ConfigError, match=r"memory=auto: .*not known here; set resources\.device_memory"):
        planned("memory=auto")


def test_a_stage_of_its_own_may_be_left_to_the_plan() -> None:
    asked = ["regimes={segprop: {stages: {base: {memory: auto}}}}", "resources.device_memory=24GiB"]
    first, second, _ = (tiers(node) for node in stages(planned(*asked)))
    assert (first.optimizer, second) == ("host", MemorySpec())


def test_micro_batches_and_places_are_settled_together() -> None:
    asked = ["memory=auto", "training.micro_batch=auto", "resources.device_memory=24GiB"]
    for node in stages(planned(*asked)):
        train = from_json(StageTask, node.task).train
        assert isinstance(train.micro_batch, int)
        assert train.micro >= 4, "smaller ones keep a device waiting"
        assert node.estimate.peak_bytes <= usable(24 * 2**30)


def test_in_a_gang_places_are_not_left_to_the_plan() -> None:
    with pytest.raises(ConfigError, match=r"auto: not in a gang"):
        planned("memory=auto", "resources.gang={size: 2, strategy: fsdp2}", "resources.device_memory=24GiB")


def test_a_run_directory_goes_on_with_auto_but_not_from_a_number_of_its_own() -> None:
    auto = planned("memory=auto", "resources.device_memory=24GiB").config.resolved()
    assert compatible(auto, auto) == []
    fixed = planned("memory.optimizer=host").config.resolved()
    assert compatible(fixed, auto)
