"""Where a stage's time is counted: every moment once, closely in some steps alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from workers.specs.results import PHASES, StageResult, TimeSpent
from workers.training.timing import stage_times
from workers.training.timing.stage_times import LOOKED_AT, StageTimes, looked_at

CPU = torch.device("cpu")


class Hand:
    """A clock that is moved by hand; how often it was read."""

    def __init__(self) -> None:
        self.now, self.reads = 100.0, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


def made(device: torch.device = CPU) -> tuple[StageTimes, Hand, Hand]:
    clock, processor = Hand(), Hand()
    return StageTimes(device, clock=clock, processor=processor), clock, processor


def steps(times: StageTimes, clock: Hand, processor: Hand, count: int, cores: float = 2.0) -> None:
    times.begin_steps()
    for _ in range(count):
        for phase, seconds in (("data", 1.0), ("forward", 3.0), ("backward", 5.0), ("update", 0.5)):
            times.at(phase)
            clock.now += seconds
            processor.now += seconds * cores
        times.at("rest")
        times.step_done()
    times.end_steps()


def test_the_phases_add_up_to_the_whole_whatever_comes_between() -> None:
    times, clock, processor = made()
    clock.now += 7
    times.at("rest")
    clock.now += 0.25
    steps(times, clock, processor, 20)
    times.at("validation")
    clock.now += 11
    before = times.at("publishing")
    clock.now += 2
    spent = times.spent()
    assert before == "validation"
    assert spent.phases == {
        "opening": 7,
        "data": 20,
        "forward": 60,
        "backward": 100,
        "update": 10,
        "validation": 11,
        "publishing": 2,
        "rest": 0.25,
    }
    assert spent.seconds == clock.now - 100
    assert list(spent.phases) == [phase for phase in PHASES if phase in spent.phases]
    assert spent.steps == 20
    assert spent.host is None


def test_processor_time_is_asked_for_in_few_steps_and_scaled_to_all() -> None:
    times, clock, processor = made()
    times.at("rest")
    asked = processor.reads
    steps(times, clock, processor, 10 * LOOKED_AT, cores=1.5)
    spent = times.spent()
    looked = sum(looked_at(step) for step in range(10 * LOOKED_AT))
    assert spent.looked_at == looked < LOOKED_AT
    assert processor.reads - asked < 10 * looked
    assert spent.processor["forward"] == pytest.approx(1.5 * spent.phases["forward"])
    assert spent.processor["data"] == pytest.approx(1.5 * spent.phases["data"])


def test_the_first_step_is_not_looked_at_and_one_in_sixteen_is() -> None:
    assert [step for step in range(50) if looked_at(step)] == [1, 2, 4, 8, 16, 32, 48]


def test_the_forward_pass_is_divided_by_the_parts_that_ran_in_it() -> None:
    times, clock, _ = made()

    class Takes(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self) -> None:
            clock.now += self.seconds

    parts = {"seg1": Takes(2.0), "head": Takes(1.0)}
    times.watch(parts)
    times.begin_steps()
    for _ in range(5):
        times.at("forward")
        for part in parts.values():
            part()
        clock.now += 0.5  # between the parts
        times.at("backward")
        parts["seg1"]()  # once more, for its activations
        times.step_done()
    times.end_steps()
    spent = times.spent()
    assert spent.forward == {"seg1": pytest.approx(10.0), "head": pytest.approx(5.0)}
    assert spent.phases == {"forward": 17.5, "backward": 10.0}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts.values())


class FakeEvent:
    """An event of a device whose clock is moved by hand."""

    device: Hand

    def __init__(self) -> None:
        self.at = FakeEvent.device.now

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


def test_on_a_device_the_steps_are_divided_by_its_own_timeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has enqueued everything at once, and waits for it where it looks up."""
    FakeEvent.device = device = Hand()
    monkeypatch.setattr(stage_times, "new_event", FakeEvent)
    times, clock, _ = made(torch.device("cuda"))
    part = nn.Identity()
    times.watch({"seg1": part})
    times.at("rest")
    times.begin_steps()
    for _ in range(6 * LOOKED_AT):
        for phase, on_host, on_device in (("forward", 0.1, 2.0), ("backward", 0.1, 6.0), ("measuring", 9.8, 2.0)):
            times.at(phase)
            if phase == "forward":
                part(torch.zeros(1))
            clock.now += on_host
            device.now += on_device
        times.at("rest")
        times.step_done()
    times.end_steps()
    times.at("validation")
    clock.now += 4.0
    spent = times.spent()
    count = 6 * LOOKED_AT
    assert spent.seconds == pytest.approx(10 * count + 4)
    assert spent.phases == pytest.approx(
        {"forward": 2 * count, "backward": 6 * count, "validation": 4, "measuring": 2 * count}
    )
    assert spent.host == pytest.approx(
        {"forward": 0.1 * count, "backward": 0.1 * count, "validation": 4, "measuring": 9.8 * count}
    )
    assert times._events == []


def test_times_come_back_from_a_result_and_older_results_have_none() -> None:
    spent = TimeSpent(
        seconds=2.0, phases={"forward": 2.0}, processor={"forward": 3.0}, processor_seconds=3.0, thread_seconds=2.0,
        system_seconds=0.1, forward={"seg1": 1.5}, steps=4, looked_at=2,
    )  # fmt: skip
    where: dict[str, Any] = {"host": "h", "pid": 1, "device": "cpu", "threads": 1, "started": 0.0, "finished": 2.0}
    plain = {
        "stage": "s",
        "parts": {},
        "epochs": [],
        "best_epoch": 0,
        "committed_epoch": 0,
        "exit": "epochs",
        "steps": 4,
        "path_is_auxiliary": False,
        "seconds": 2.0,
        "where": where,
    }
    assert StageResult.from_json({**plain, "times": spent.to_json()}).times == spent
    assert StageResult.from_json(plain).times is None
    assert "times" not in StageResult.from_json(plain).to_json()
