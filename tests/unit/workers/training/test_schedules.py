"""Schedules and optimizers by name: what adding one takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from workers.specs.experiment import OptimizerSpec, ScheduleSpec
from workers.training.optimizer import OPTIMIZERS, build_optimizer
from workers.training.schedules import SCHEDULES, learning_rate


def test_a_schedule_is_one_row_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "halfway", lambda share, final: 1.0 if share < 0.5 else final)
    name: Any = "halfway"
    schedule = ScheduleSpec(name=name, warmup=0.2, final=0.1)
    rates = [learning_rate(2.0, schedule, step, 10) for step in range(10)]
    assert rates == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.2, 0.2, 0.2, 0.2]


def test_an_optimizer_is_one_row_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "rprop", lambda spec, parameters: torch.optim.Rprop(parameters, lr=spec.lr))
    name: Any = "rprop"
    optimizer = build_optimizer(OptimizerSpec(name=name, lr=0.5), [nn.Parameter(torch.zeros(2))])
    assert isinstance(optimizer, torch.optim.Rprop)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("spec", "table"), [(ScheduleSpec, SCHEDULES), (OptimizerSpec, OPTIMIZERS)])
def test_a_configuration_can_ask_for_every_row_and_for_nothing_else(spec: type, table: dict[str, Any]) -> None:
    assert set(get_args(get_type_hints(spec)["name"])) == set(table)


#: Name -> transformers' schedule of the same meaning, of optimizer, warm-up steps and all steps.
THEIRS: dict[str, Callable[[torch.optim.Optimizer, int, int], torch.optim.lr_scheduler.LambdaLR]] = {
    "constant": lambda optimizer, warm, total: get_constant_schedule_with_warmup(optimizer, warm),
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
}


def their_rates(name: str, base: float, warm: int, total: int) -> list[float]:
    """Step a schedule of transformers as a training loop does: the rate that every step is taken with."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    schedule, rates = THEIRS[name](optimizer, warm, total), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("total", "warm"), [(1, 0), (2, 1), (10, 0), (10, 1), (40, 10), (333, 37), (1000, 999)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_transformers_to_the_bit_at_every_step(name: Any, total: int, warm: int) -> None:
    schedule = ScheduleSpec(name=name, warmup=warm / total)
    ours = [learning_rate(3e-4, schedule, step, total) for step in range(total)]
    assert ours == their_rates(name, 3e-4, warm, total)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_last_step_has_a_rate_and_the_final_share_is_where_it_leads(name: Any) -> None:
    schedule = ScheduleSpec(name=name, warmup=0.1)
    assert learning_rate(0.3, schedule, 19, 20) > 0
    raised = ScheduleSpec(name=name, warmup=0.1, final=0.25)
    for step in range(2, 20):
        plain = learning_rate(0.3, schedule, step, 20)
        assert learning_rate(0.3, raised, step, 20) == pytest.approx(0.25 * 0.3 + 0.75 * plain, rel=1e-12)
    assert learning_rate(0.3, raised, 20, 20) == pytest.approx(0.25 * 0.3, rel=1e-12)
