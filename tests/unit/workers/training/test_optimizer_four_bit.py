"""AdamW with moments in 4 bits: torchao's own bits in our loop, also after a stop."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from four_bits import needs_torchao, torchao_there
from safetensors.torch import load, save
from torch import nn

from workers.specs.experiment import OptimizerSpec
from workers.specs.tier_bytes import optimizer_bytes
from workers.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer

NAMES = ["layer0/matrix", "layer0/norm", "layer0/odd"]

pytestmark = needs_torchao


@pytest.fixture(autouse=True)
def _with_torchao() -> Iterator[None]:
    with torchao_there():
        yield


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One with 4-bit moments, one too small for them, one that is no whole number of blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 128), (80,), (67, 63)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(held: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in held:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def ours(held: list[nn.Parameter], which: range, optimizer: Any = None, spec: Any = None) -> torch.optim.Optimizer:
    """The steps as a stage takes them, at a rate that changes."""
    optimizer = optimizer or build_optimizer(spec or OptimizerSpec(name="adamw4bit"), held, ("a stage",))
    for step in which:
        gradients(held, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
    return optimizer  # type: ignore[no-any-return]


def test_an_ordinary_loop_with_torchaos_optimizer_has_the_same_bits() -> None:
    held, theirs = parameters(), parameters()
    ours(held, range(6))
    optimizer = importlib.import_module("torchao.optim").AdamW4bit(theirs, lr=1.0, weight_decay=0.01)
    with torch.compiler.set_stance("force_eager"):
        for step in range(6):
            gradients(theirs, step)
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))
            optimizer.step()
    assert all(torch.equal(mine, other) for mine, other in zip(held, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_went_through_a_file_goes_on_with_the_same_bits(dtype: torch.dtype) -> None:
    straight, stopped = parameters(dtype), parameters(dtype)
    ours(straight, range(6))
    kept = load(save(optimizer_tensors(ours(stopped, range(3)), NAMES)))
    assert {"layer0/matrix//exp_avg.codes", "layer0/matrix//exp_avg_sq.scale", "layer0/odd//exp_avg"} <= kept.keys()
    torch.manual_seed(123)
    fresh = build_optimizer(OptimizerSpec(name="adamw4bit"), stopped, ("a stage",))
    restore_optimizer(fresh, NAMES, kept)
    again = optimizer_tensors(fresh, NAMES)
    assert kept.keys() == again.keys()
    assert all(torch.equal(again[key], value) for key, value in kept.items())
    ours(stopped, range(3, 6), fresh)
    assert all(torch.equal(mine, other) for mine, other in zip(straight, stopped, strict=True))


def test_narrow_weights_are_rounded_up_or_down_by_chance_and_to_the_nearest_where_that_is_asked() -> None:
    spec = {name: OptimizerSpec(name="adamw4bit", rounding=name) for name in ("stochastic", "nearest")}  # type: ignore[arg-type]
    found = {name: parameters(torch.bfloat16) for name in spec}
    for name, held in found.items():
        before = torch.random.get_rng_state()
        ours(held, range(2), spec=spec[name])
        assert torch.equal(torch.random.get_rng_state(), before), "dropout draws from it"
    assert not torch.equal(found["stochastic"][0], found["nearest"][0])


def test_the_plan_counts_what_the_states_of_a_matrix_take() -> None:
    spec, matrix = OptimizerSpec(name="adamw4bit"), nn.Parameter(torch.randn(1024, 128))
    optimizer = ours([matrix], range(1))
    tensors = optimizer_tensors(optimizer, ["a/matrix"])
    held = sum(value.nbytes for key, value in tensors.items() if "." in key.partition("//")[2])
    assert held == optimizer_bytes(spec, matrix.numel(), matrix.nbytes) == round(matrix.numel() * (1 + 2 * 4 / 128))
