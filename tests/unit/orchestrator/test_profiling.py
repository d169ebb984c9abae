"""`segprop profile`: which stage is meant, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_run import make_plan

from cache_store.errors import OutOfDeviceMemory, UserError
from cache_store.storage.open import open_storage
from orchestrator.plan.graph import Plan
from orchestrator.profiling import Found, find_stage, phase_rows
from workers.specs.orders import WorkOrder
from workers.specs.results import TimeSpent
from workers.tasks import profile


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("plan"), regimes="[e2e, lw, segprop]", epochs=2)


@pytest.mark.parametrize(
    ("stage", "regime", "label"),
    [
        (None, None, "e2e/e2e"),
        (None, "segprop", "segprop/stage1-base"),
        ("stage2-seg2", "segprop", "segprop/stage2-seg2"),
        ("stage2-seg2", None, "lw/stage2-seg2"),
        ("segprop/stage2-seg2", None, "segprop/stage2-seg2"),
        ("stage1-base", None, "segprop/stage1-base"),
        ("2", "segprop", "segprop/stage2-seg2"),
        ("2", None, "lw/stage2-seg2"),
    ],
)
def test_a_stage_is_found_by_name_by_number_and_by_regime(
    plan: Plan, stage: str | None, regime: str | None, label: str
) -> None:
    found = find_stage(plan, stage, regime)
    assert f"{found.regime}/{found.node.task['name']}" == label


@pytest.mark.parametrize(
    ("stage", "regime", "message"),
    [
        ("stage2-sag2", "segprop", "--stage: 'stage2-sag2' is no stage here; did you mean 'stage2-seg2'?"),
        ("9", "e2e", "--stage: '9' is no stage here; there are e2e/e2e"),
        ("0", "e2e", "--stage: '0' is no stage here; there are e2e/e2e"),
        (None, "segprob", "--regime: 'segprob' is not in this configuration; did you mean 'segprop'?"),
        ("quux/stage1", None, "--regime: 'quux' is not in this configuration; it has e2e, lw, segprop"),
    ],
)
def test_one_that_is_not_there_is_refused_with_the_nearest_name(
    plan: Plan, stage: str | None, regime: str | None, message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        find_stage(plan, stage, regime)
    assert refusal.value.message == message


def test_of_a_stage_in_rounds_the_first_is_taken(tmp_path: Path) -> None:
    regimes = "{w: {kind: segprop, pipeline: wavefront}}"
    found: Found = find_stage(make_plan(tmp_path, regimes=regimes, epochs=4), "2", None)
    assert found.node.task["round"]["first"] == 0


def test_the_table_has_clock_processor_and_cores_a_step_and_parts_below_the_forward_pass() -> None:
    times = TimeSpent(
        seconds=2.0,
        phases={"data": 0.5, "forward": 1.5},
        processor={"data": 0.1, "forward": 3.0},
        processor_seconds=3.1,
        thread_seconds=1.9,
        system_seconds=0.0,
        forward={"seg1": 1.2},
        steps=10,
        looked_at=10,
    )
    assert list(phase_rows(times)) == [
        ["waiting for data", "50.00", "25.0 %", "10.00", "0.20"],
        ["forward", "150.00", "75.0 %", "300.00", "2.00"],
        ["  seg1", "120.00", "60.0 %", "", ""],
        ["all", "200.00", "100.0 %", "310.00", "1.55"],
    ]


def test_on_a_device_cores_go_by_the_clock_of_the_host() -> None:
    times = TimeSpent(
        seconds=2.0,
        phases={"forward": 2.0},
        processor={"forward": 0.5, "measuring": 1.0},
        processor_seconds=1.5,
        thread_seconds=1.5,
        system_seconds=0.0,
        steps=1,
        looked_at=1,
        host={"forward": 0.5, "measuring": 1.5},
    )
    assert next(phase_rows(times)) == ["forward", "2000.00", "100.0 %", "500.00", "1.00", "500.00"]


def test_a_device_that_is_too_small_is_told_with_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB.")

    monkeypatch.setattr(profile, "_profile", full)
    order = WorkOrder("n", "train", {"name": "stage2-seg2"}, {}, "store", "cuda", 1)
    asked = profile.ProfileOrder(order=order, parents={}, makers={}, initial="m", steps=1, trace=tmp_path / "t.json")
    with pytest.raises(OutOfDeviceMemory, match=r"stage2-seg2: out of memory on cuda: Tried to allocate 9 GiB\."):
        profile.profile_stage(asked, open_storage(str(tmp_path / "store")))
