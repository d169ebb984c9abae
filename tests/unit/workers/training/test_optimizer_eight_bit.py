"""AdamW with moments in 8 bits: it follows AdamW, and a resumed one goes on bit for bit."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from workers.specs.experiment import OptimizerSpec
from workers.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer

pytest.importorskip("bitsandbytes")
NAMES = ["layer0/matrix", "layer0/norm", "layer0/filter"]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One with 8-bit moments, one too small for them, and one whose memory is in another order."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 80), (80,), (32, 16, 3, 3)]
    found = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    found[2].data = found[2].data.to(memory_format=torch.channels_last)
    return found


def steps(optimizer: torch.optim.Optimizer, held: list[nn.Parameter], which: range) -> None:
    for step in which:
        generator = torch.Generator().manual_seed(step)
        for parameter in held:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def make(held: list[nn.Parameter], name: Any = "adamw8bit") -> torch.optim.Optimizer:
    return build_optimizer(OptimizerSpec(name=name, lr=1e-2), held)


def values(held: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in held]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=8, deadline=None)
@given(before=st.integers(1, 5), after=st.integers(1, 4))
def test_resuming_from_a_file_gives_the_same_bits(dtype: torch.dtype, name: str, before: int, after: int) -> None:
    whole = parameters(dtype)
    optimizer = make(whole, name)
    steps(optimizer, whole, range(before))
    live = optimizer_tensors(optimizer, NAMES)  # which goes on changing
    file = save({key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in live.items()})
    middle = values(whole)
    steps(optimizer, whole, range(before, before + after))

    resumed = parameters(dtype)
    for parameter, value in zip(resumed, middle, strict=True):
        parameter.data.copy_(value)
    fresh = make(resumed, name)
    restore_optimizer(fresh, NAMES, load(file))
    steps(fresh, resumed, range(before, before + after))
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_a_step_count_beyond_what_the_parameters_type_can_count_survives() -> None:
    held = parameters(torch.bfloat16)
    optimizer = make(held)
    steps(optimizer, held, range(1))
    for state in optimizer.state.values():
        state["step"] = 1001  # bfloat16 knows 1000 and 1004
    tensors = optimizer_tensors(optimizer, NAMES)
    fresh = make(parameters(torch.bfloat16))
    restore_optimizer(fresh, NAMES, tensors)
    assert [state["step"] for state in fresh.state.values()] == [1001] * 3
    assert all(isinstance(state["step"], int) for state in fresh.state.values())


def test_it_moves_weights_nearly_as_adamw_does_with_a_quarter_of_the_state() -> None:
    exact, eight = parameters(), parameters()
    start = values(exact)
    one, other = make(exact, "adamw"), make(eight)
    steps(one, exact, range(10))
    steps(other, eight, range(10))
    moved = float((exact[0] - start[0]).detach().norm())
    assert float((exact[0] - eight[0]).detach().norm()) < 0.05 * moved
    size = {
        id(optimizer): sum(t.nbytes for t in optimizer.state[held[0]].values() if isinstance(t, Tensor))
        for optimizer, held in ((one, exact), (other, eight))
    }
    # Beside the moments: a float32 scale a block of 256, and the two tables of values.
    assert size[id(other)] < size[id(one)] / 4 + 2 * 4 * exact[0].numel() / 256 + 2 * 1024 + 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 128, 256, 576, 1000])
def test_rows_without_gradient_stay_at_any_width(width: int, dtype: torch.dtype) -> None:
    """Blocks of 256 moments go across rows where the width is no multiple of it."""
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn((60, width), generator=generator).to(dtype))
    start = table.detach().clone()
    optimizer = build_optimizer(OptimizerSpec(name="adamw8bit", lr=1e-2, weight_decay=0.0), [table])
    for _ in range(5):
        gradient = torch.randn((60, width), generator=generator)
        gradient[1::2] = 0
        table.grad = gradient.to(dtype)
        optimizer.step()
    assert torch.equal(table[1::2], start[1::2])
    assert bool((table[::2] != start[::2]).any(dim=1).all())


def test_a_row_that_seldom_has_gradients_moves_no_further_than_with_adamw() -> None:
    """A second moment rounded to zero under a first one that is not would be divided by eps alone."""
    moved = {}
    for name in ("adamw", "adamw8bit"):
        table = nn.Parameter(torch.zeros(64, 96))
        optimizer = build_optimizer(OptimizerSpec(name=cast("Any", name), lr=1e-2, weight_decay=0.0), [table])
        for step in range(4):
            table.grad = torch.ones(64, 96)
            table.grad[1::2] = 1e-4 if step == 0 else 0.0
            optimizer.step()
        moved[name] = float(table.detach()[1::2].abs().max())
    assert 0 < moved["adamw8bit"] <= moved["adamw"]
