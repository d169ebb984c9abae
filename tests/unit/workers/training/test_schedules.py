"""Schedules and optimizers by name: what adding one takes."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from workers.specs.experiment import OptimizerSpec, ScheduleSpec
from workers.training.optimizer import OPTIMIZERS, build_optimizer
from workers.training.schedules import SCHEDULES, learning_rate


def test_a_schedule_is_one_row_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "halfway", lambda share, final: 1.0 if share < 0.5 else final)
    name: Any = "halfway"
    schedule = ScheduleSpec(name=name, warmup=0.2, final=0.1)
    rates = [learning_rate(2.0, schedule, step, 10) for step in range(10)]
    assert rates == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.2, 0.2, 0.2, 0.2]


def test_an_optimizer_is_one_row_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "rprop", lambda spec, parameters: torch.optim.Rprop(parameters, lr=spec.lr))
    name: Any = "rprop"
    optimizer = build_optimizer(OptimizerSpec(name=name, lr=0.5), [nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torch.optim.Rprop)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("spec", "table"), [(ScheduleSpec, SCHEDULES), (OptimizerSpec, OPTIMIZERS)])
def test_a_configuration_can_ask_for_every_row_and_for_nothing_else(spec: type, table: dict[str, Any]) -> None:
    assert set(get_args(get_type_hints(spec)["name"])) == set(table)


def test_rates_of_the_schedules_are_those_they_always_were() -> None:
    def rates(**settings: Any) -> list[float]:
        return [learning_rate(0.3, ScheduleSpec(**settings), step, 5) for step in range(5)]

    assert rates(name="constant", final=0.1) == [0.3] * 5
    assert rates(name="linear", final=0.0) == [0.3, 0.3 * 0.75, 0.3 * 0.5, 0.3 * 0.25, 0.0]
    assert rates(name="cosine", final=0.5)[4] == 0.3 * 0.5
