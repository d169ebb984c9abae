"""States, masters and gradients on the host or on disk beside a GPU: copies lose nothing, the device is rid of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import lm_changes
from running import Lab, StopAfter, digests
from torch import nn

from workers.specs.experiment import OptimizerSpec
from workers.specs.memory import MemorySpec
from workers.training import clocks
from workers.training.tiers.optimizer import TieredOptimizer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STAGE = "segprop/stage2-layer1"
MEMORIES: list[dict[str, str]] = [
    {"optimizer": "host"},
    {"optimizer": "disk"},
    {"optimizer": "host", "masters": "host"},
    {"optimizer": "disk", "masters": "disk"},
]


@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_updates_beside_a_gpu_are_those_of_the_host(memory: dict[str, Any], tmp_path: Path) -> None:
    """Gradients of several buffers of copies, in two micro-batches, so that the second is added on the host."""
    spec = OptimizerSpec(lr=1e-3)
    section = MemorySpec(**memory, disk=str(tmp_path))
    dtype = torch.bfloat16 if "masters" in memory else torch.float32
    generator = torch.Generator().manual_seed(0)
    sizes = [(5000, 4001), (300, 7)]
    initial = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    slopes = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    found = {}
    for device in (CUDA, CPU):
        held = [nn.Parameter(each.to(device, copy=True)) for each in initial]
        optimizer = TieredOptimizer(spec, held, ("stage", 0), section, device)
        for _ in range(3):
            for part in (1.0, 0.5):
                for parameter, slope in zip(held, slopes, strict=True):
                    (parameter * (slope.to(device) * part)).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.gather()
            optimizer.step()
            optimizer.zero_grad()
        found[device] = [each.detach().cpu() for each in held]
        optimizer.close()
    assert all(torch.equal(*pair) for pair in zip(found[CUDA], found[CPU], strict=True))


def lab(folder: Path, memory: dict[str, str], scratch: Path, **more: Any) -> Lab:
    narrow = {"model.master": "bfloat16", "training.precision": "bf16", "training.micro_batch": 3, "training.clip": 0.5}
    section = {"memory": {**memory, "disk": str(scratch)}}
    return Lab.make(folder, {**lm_changes(folder), **narrow, "regimes": ["segprop"], **section, **more})


@pytest.mark.parametrize("masters", ["none", "host"])
def test_host_and_disk_train_to_the_same_bits_and_a_stopped_stage_goes_on(
    masters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    found = []
    for tier in ("host", "disk"):
        memory = {"optimizer": tier, "masters": masters}
        found.append(digests(lab(tmp_path / tier, memory, tmp_path / "scratch").run(STAGE)))
    assert found[0] == found[1]
    memory = {"optimizer": "host", "masters": masters}
    stopped = lab(tmp_path / "stopped", memory, tmp_path / "scratch", **{"training.checkpoint_every_s": 1e-6})
    stopped.prepare(STAGE)
    with pytest.raises(RuntimeError, match="crashed"):
        stopped.run(STAGE, StopAfter(3, RuntimeError))
    assert digests(stopped.run(STAGE)) == found[0]


def test_states_and_gradients_are_not_on_the_device() -> None:
    """8 million parameters of 4 bytes: weights stay, moments and gradients do not."""
    held = [nn.Parameter(torch.zeros(1 << 20, device=CUDA)) for _ in range(8)]
    optimizer = TieredOptimizer(OptimizerSpec(), held, ("stage", 0), MemorySpec(optimizer="host"), CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sum((each * each).sum() for each in held).backward()  # type: ignore[union-attr]
    optimizer.gather()
    assert torch.cuda.memory_allocated() - before < 1 << 20
    optimizer.step()
    assert torch.cuda.memory_allocated() - before < 1 << 20
    optimizer.close()
