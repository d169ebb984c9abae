"""Updates beside the device give the bits of torch's own; masters lose nothing; files stay out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.specs.experiment import OptimizerSpec
from workers.specs.memory import MemorySpec
from workers.training.optimizer import build_optimizer, optimizer_tensors
from workers.training.tiers import steppers
from workers.training.tiers.optimizer import TieredOptimizer
from workers.training.tiers.places import DiskPlace

CPU = torch.device("cpu")
HOST = MemorySpec(optimizer="host")
NAMES = ["matrix", "filter", "bias"]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Of sizes that no vector register divides; the second lies in memory in another order."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(size, generator=generator) * 0.02 for size in ((301, 257), (16, 8, 3, 3), (7,))]
    found[1] = found[1].to(memory_format=torch.channels_last)
    return [nn.Parameter(each.to(dtype)) for each in found]


def backward(held: list[nn.Parameter], step: int) -> None:
    """Real gradients, a little different in every step."""
    generator = torch.Generator().manual_seed(100 + step)
    # The last one has none in every other step.
    targets = [torch.randn(each.shape, generator=generator) * 0.02 for each in held[: 3 - step % 2]]
    for parameter, target in zip(held, targets, strict=False):
        ((parameter.float() - target) ** 2).sum().backward()  # type: ignore[no-untyped-call]


def train(optimizer: torch.optim.Optimizer, held: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        backward(held, step)
        if isinstance(optimizer, TieredOptimizer):
            optimizer.gather()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def tiered(held: list[nn.Parameter], memory: MemorySpec, **spec: Any) -> TieredOptimizer:
    return TieredOptimizer(OptimizerSpec(lr=1e-3, **spec), held, ("stage", 0), memory, CPU)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_pieces_give_the_bits_of_the_whole(
    name: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steppers, "PIECE", 1 << 10)
    found = []
    for memory in (None, HOST, MemorySpec(optimizer="disk", disk=str(tmp_path))):
        held = parameters(dtype)
        spec = OptimizerSpec(name=name, lr=1e-3)
        made = build_optimizer(spec, held, ("stage", 0)) if memory is None else tiered(held, memory, name=name)
        train(made, held, range(5))
        found.append((held, optimizer_tensors(made, NAMES)))
    (weights, states), *others = found
    for other, own in others:
        assert all(torch.equal(*pair) for pair in zip(weights, other, strict=True))
        assert all(torch.equal(tensor, own[key]) for key, tensor in states.items())


def test_masters_are_trained_as_an_ordinary_loop_trains_float32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steppers, "PIECE", 1 << 10)
    held = parameters(torch.bfloat16)
    masters = [nn.Parameter(each.detach().float()) for each in held]
    ours = tiered(held, MemorySpec(masters="device"))
    plain = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.01, fused=True)
    for step in range(5):
        computing = [nn.Parameter(each.detach().bfloat16()) for each in masters]
        for _ in range(2):  # two micro-batches, added up in float32
            backward(held, step)
            backward(computing, step)
            for master, each in zip(masters, computing, strict=True):
                if each.grad is not None:
                    master.grad = each.grad.float() if master.grad is None else master.grad + each.grad.float()
                    each.grad = None
        ours.gather()
        for optimizer in (ours, plain):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for parameter, master in zip(held, masters, strict=True):
        assert torch.equal(parameter, master.bfloat16())
    kept = optimizer_tensors(ours, NAMES)
    assert torch.equal(kept["matrix//master"], masters[0])


def test_a_master_goes_on_where_its_weight_is_its_rounding_and_else_begins_again() -> None:
    held = parameters(torch.bfloat16)
    first = tiered(held, MemorySpec(masters="device"))
    train(first, held, range(3))
    kept = {key: tensor.clone() for key, tensor in optimizer_tensors(first, NAMES).items()}
    with torch.no_grad():
        held[0][0] += 1.0  # as an average of heads would change them
    second = tiered(held, MemorySpec(masters="device"))
    second.restore(NAMES, kept)
    master: Tensor = optimizer_tensors(second, NAMES)["matrix//master"]
    assert torch.equal(master[0], held[0][0].float())
    assert torch.equal(master[1:], kept["matrix//master"][1:])


@pytest.mark.parametrize("lets_go", [True, False])
def test_states_on_disk_are_in_memory_only_while_they_are_updated(
    lets_go: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lets_go:
        monkeypatch.setattr(DiskPlace, "let_go", lambda *_: None)
    held = [nn.Parameter(torch.zeros(4 * steppers.PIECE))]
    optimizer = tiered(held, MemorySpec(optimizer="disk", disk=str(tmp_path)))
    before = mapped_bytes()
    held[0].grad = torch.ones_like(held[0])
    optimizer.step()
    grown, states = mapped_bytes() - before, 2 * held[0].nbytes
    assert grown < states // 8 if lets_go else grown > states // 2


def mapped_bytes() -> int:
    """Memory of this process that files back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:")) * 1024
