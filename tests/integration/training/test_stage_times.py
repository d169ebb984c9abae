"""Where the time of real stages goes: all of it is accounted for, and counting changes no bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import DEVICE, Lab, digests

from workers.specs.results import StageResult
from workers.training import trainer
from workers.training.timing.stage_times import StageTimes

#: Seconds of a stage that its phases may miss, and the share: what comes before the first and behind the last clock.
MISSED_S, MISSED = 0.1, 0.05
STAGE = "segprop/stage2-seg2-seg3"
CHANGES = {"training.epochs": 2, "data.train_limit": 288, "training.batch_size": 16}


class Uncounted(StageTimes):
    """Looks at no clock in the steps."""

    def at(self, phase: str) -> str:
        return phase

    def looks_at(self, step: int) -> bool:
        return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    changes = {**CHANGES, "regimes": {"segprop": {"snapshots": {"mode": "never"}, "split": {"segment_size": 2}}}}
    made = Lab.make(tmp_path_factory.mktemp("times"), changes)
    made.run(STAGE)
    return made


def test_the_phases_of_a_stage_add_up_to_its_time_on_the_clock(lab: Lab) -> None:
    result = lab.commit(STAGE).read(StageResult)
    times, where = result.times, result.where
    assert times is not None
    assert times.seconds == pytest.approx(sum(times.phases.values()))
    assert times.seconds == pytest.approx(where.finished - where.started, abs=MISSED_S, rel=MISSED)
    expected = {"opening", "data", "copies", "prefix", "forward", "loss", "backward", "update", "validation"}
    assert set(times.phases) >= expected | {"publishing", "measuring"}
    # What nobody has a name for is little.
    assert times.phases["rest"] < 0.1 * times.seconds
    steps = sum(times.phases[phase] for phase in ("data", "copies", "prefix", "forward", "loss", "backward", "update"))
    assert steps < sum(epoch.seconds for epoch in result.epochs)
    assert steps > 0.8 * sum(epoch.seconds for epoch in result.epochs)
    assert 0 < times.thread_seconds <= times.processor_seconds + 0.01
    assert sum(times.processor.values()) == pytest.approx(times.processor_seconds, rel=0.3)
    assert set(times.forward) == {"seg2", "seg3", "adapter", "head"}
    assert 0.5 * times.phases["forward"] < sum(times.forward.values()) <= times.phases["forward"]
    assert times.steps == result.steps
    assert 0 < times.looked_at < times.steps
    assert (times.host is None) == (DEVICE.type == "cpu")


def test_counting_changes_no_weight_and_leaves_no_hook(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = digests(lab.commit(STAGE))
    made: list[StageTimes] = []

    def uncounted(device: torch.device, *, started: float | None = None) -> StageTimes:
        made.append(Uncounted(device, started=started))
        return made[-1]

    monkeypatch.setattr(trainer, "StageTimes", uncounted)
    lab.forget(STAGE)
    assert digests(lab.run(STAGE)) == counted
    assert len(made) == 1
    assert made[0].spent().looked_at == 0
