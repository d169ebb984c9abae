"""Weights in bfloat16 follow those in float32: nothing is lost on average, and what is lost otherwise is measured."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.specs.experiment import OptimizerSpec
from workers.training.optimizer import optimizer_tensors, restore_optimizer
from workers.training.updates.low_precision import LOW_PRECISION, random_bits, share_of, store_rounded
from workers.update_slices import SLICE

CPU = torch.device("cpu")
EIGHT = pytest.param(
    "adamw8bit", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
)
RULES = ["adamw", "sgd", EIGHT]
NAMES = ["matrix", "filter"]


def draws(count: int, key: int = 7) -> Tensor:
    return random_bits(key, 0, count, CPU) & 0xFFFF


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Of the size of a pretrained model's weights; the second lies in memory in another order."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(300, 257, generator=generator) * 0.02, torch.randn(16, 8, 3, 3, generator=generator) * 0.02]
    found[1] = found[1].to(memory_format=torch.channels_last)
    return [nn.Parameter(each.to(dtype)) for each in found]


def make(held: list[nn.Parameter], name: Any, rounding: Any, lr: float = 1e-5) -> torch.optim.Optimizer:
    return LOW_PRECISION[name](
        OptimizerSpec(name=name, lr=lr, weight_decay=0.01, rounding=rounding), held, ("stage", 0)
    )


def train(optimizer: torch.optim.Optimizer, held: list[nn.Parameter], steps: range) -> None:
    """Towards fixed targets, with noise in the gradients."""
    targets = [torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) * 0.02 for each in held]
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter, target in zip(held, targets, strict=True):
            noise = torch.randn(parameter.shape, generator=generator) * 0.01
            parameter.grad = (parameter.detach().float() - target + noise).to(parameter.dtype)
        optimizer.step()


def test_a_value_between_two_neighbours_becomes_either_in_proportion() -> None:
    values = torch.full((1 << 18,), -(1.0 + 0.3 / 128))  # three tenths of the way from -1 to the next one
    target = torch.empty(len(values), dtype=torch.bfloat16)
    store_rounded(values.clone(), target, draws(len(values)))
    assert target.unique().tolist() == [-1.0078125, -1.0]
    assert float((target == -1.0078125).float().mean()) == pytest.approx(0.3, abs=0.005)


def test_what_a_bfloat16_holds_and_what_is_no_number_stay_as_they_are() -> None:
    exact = torch.tensor([0.0, -1.5, 3e38, torch.inf, -torch.inf, torch.nan]).to(torch.bfloat16)
    target = torch.empty_like(exact)
    store_rounded(exact.float(), target, torch.full((6,), 0xFFFF, dtype=torch.int32))
    torch.testing.assert_close(target, exact, rtol=0, atol=0, equal_nan=True)


def test_draws_are_uniform_and_do_not_depend_on_how_the_work_is_cut() -> None:
    whole = random_bits(123, 0, 1 << 16, CPU)
    pieces = [random_bits(123, at, 1 << 14, CPU) for at in range(0, 1 << 16, 1 << 14)]
    assert torch.equal(whole, torch.cat(pieces))
    for half in (whole & 0xFFFF, (whole >> 16) & 0xFFFF):
        counts = torch.bincount(half >> 12, minlength=16).float()
        # 4096 expected in each of 16 bins: 62 is one standard deviation.
        assert float((counts - 4096).abs().max()) < 5 * 62
    other = random_bits(124_000_001, 0, 1 << 16, CPU)
    assert abs(float(torch.corrcoef(torch.stack([whole & 0xFFFF, other & 0xFFFF]).float())[0, 1])) < 0.02


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_float32_weights_move_as_torchs_own_optimizer_moves_them(name: Any) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = make(ours, name, "stochastic", lr=1e-3)
    group = optimizer.param_groups[0]
    reference: torch.optim.Optimizer = (
        torch.optim.SGD(theirs, lr=group["lr"], momentum=0.9, weight_decay=0.01)
        if name == "sgd"
        else torch.optim.AdamW(theirs, lr=group["lr"], weight_decay=0.01)
    )
    train(optimizer, ours, range(20))
    train(reference, theirs, range(20))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("name", RULES)
def test_small_steps_move_bfloat16_weights_as_far_as_float32_ones(name: Any, rounding: Any) -> None:
    if name == "adamw8bit" and rounding == "compensated":
        pytest.skip("bitsandbytes keeps no compensation")
    exact, low, nearest = parameters(torch.float32), parameters(torch.bfloat16), parameters(torch.bfloat16)
    start = [each.detach().clone() for each in exact]
    for held, how in ((exact, "nearest"), (low, rounding), (nearest, "nearest")):
        train(make(held, name, how), held, range(200))

    def moved(held: list[nn.Parameter]) -> float:
        """How far, along the way that float32 weights went; 1 is as far as they."""
        way = exact[0].detach() - start[0]
        begin = start[0] if held is exact else start[0].to(torch.bfloat16).float()
        return float(((held[0].detach().float() - begin) * way).sum() / way.square().sum())

    assert moved(low) == pytest.approx(1.0, abs=0.03)
    assert moved(nearest) < 0.6


@pytest.mark.parametrize("name", RULES)
def test_the_share_that_rounding_swallows_is_measured(name: Any) -> None:
    shares = {}
    for rounding in ("nearest", "stochastic"):
        held = parameters(torch.bfloat16)
        optimizer: Any = make(held, name, rounding)
        train(optimizer, held, range(40))
        shares[rounding] = share_of([optimizer.swallowed.sums()])
    assert shares["nearest"] > 0.5
    assert shares["stochastic"] < 0.02
    exact: Any = make(parameters(torch.float32), name, "nearest")
    assert share_of([exact.swallowed.sums()]) is None


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("name", RULES)
def test_a_stage_that_was_killed_draws_the_same_bits(name: Any, rounding: Any) -> None:
    whole = parameters(torch.bfloat16)
    optimizer = make(whole, name, rounding)
    train(optimizer, whole, range(3))
    # They are the live state, which goes on changing: a checkpoint has them as they are now.
    tensors = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer, NAMES).items()}
    middle = [each.detach().clone() for each in whole]
    train(optimizer, whole, range(3, 6))

    resumed = parameters(torch.bfloat16)
    for parameter, value in zip(resumed, middle, strict=True):
        parameter.data.copy_(value)
    fresh = make(resumed, name, rounding)
    restore_optimizer(fresh, NAMES, tensors)
    train(fresh, resumed, range(3, 6))
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", RULES)
def test_the_weights_do_not_depend_on_how_large_a_slice_is(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for size in (1 << 10, 1 << 20):
        monkeypatch.setitem(SLICE, "cpu", size)
        held = parameters(torch.bfloat16)
        train(make(held, name, "stochastic"), held, range(3))
        outcomes.append(held)
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_second_moments_decay_as_in_float32_though_a_step_is_less_than_their_precision() -> None:
    """A step takes a thousandth off; the nearest bfloat16 to what is left is the number itself."""
    decayed = {}
    for rounding in ("stochastic", "nearest"):
        held = [nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))]
        optimizer = make(held, "adamw", rounding)
        for step in range(501):
            held[0].grad = torch.full_like(held[0], 1.0 if step == 0 else 0.0)
            optimizer.step()
            if step == 0:
                first = optimizer.state[held[0]]["exp_avg_sq"].float().mean()
        decayed[rounding] = float(optimizer.state[held[0]]["exp_avg_sq"].float().mean() / first)
    assert decayed["stochastic"] == pytest.approx(0.999**500, rel=0.02)
    assert decayed["nearest"] > 0.99


def test_stochastic_rounding_keeps_two_bytes_a_number() -> None:
    held = parameters(torch.bfloat16)
    optimizer = make(held, "adamw", "stochastic")
    train(optimizer, held, range(1))
    for parameter in held:
        state = optimizer.state[parameter]
        assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
