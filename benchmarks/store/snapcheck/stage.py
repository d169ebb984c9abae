"""A training step fed from snapshots beside the same step fed from one tensor in memory."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import Json
from benchmarks.store.snapcheck.reading import Reading
from cache_store.formats.codec import Array
from workers.snapshots.boundary import GATHER_THREADS
from workers.training.prefetch import prefetch

AHEAD = 2
SETTLING = 2
#: Samples of a batch, by device and kind: enough work for the device that a step is not all launches.
BATCHES = {"cpu": {"maps": 32, "states": 8}, "cuda": {"maps": 256, "states": 64}}
STEPS = {"cpu": 8, "cuda": 100}


def measure(reading: Reading, kind: str, rounds: int, device: str = "cpu") -> Json:
    """Seconds of steps in turns, batches loaded ahead in the background in every case, all cores for the step.

    `snapshots`: gathered from the mapped shards; `memory`: from one tensor on the host. On a CUDA device both into
    pinned memory, copied asynchronously; `device` there: from one tensor that lies on the device already.
    """
    batch, steps, cuda = BATCHES[device][kind], STEPS[device], device == "cuda"
    whole = reading.in_memory()
    # As many threads as a run's reader has, and as many for the tensor in memory.
    threads = min(GATHER_THREADS, harness.cores()) if cuda else 1
    reader = reading.fresh(threads)
    for shard in range(reading.spec.shards):
        reader.snapshots.touch(shard)
    step = (_map_step if kind == "maps" else _token_step)(reading, device)
    buffers = [(torch.zeros_like(whole[: 300 * batch]),) for _ in range(0 if cuda else AHEAD + 2)]
    resident = whole.to(device) if cuda else whole
    turn = iter(range(10**6))
    cases = 4 if cuda else 3

    def buffer(rows: Array, place: int) -> torch.Tensor:
        return reader.empty(len(rows), pinned=True)[0] if cuda else buffers[place % len(buffers)][0][: len(rows)]

    def from_snapshots(rows: Array, place: int) -> torch.Tensor:
        return reader.gather(rows, (buffer(rows, place),))[0]

    def from_memory(rows: Array, place: int) -> torch.Tensor:
        return torch.index_select(whole, 0, torch.from_numpy(rows), out=buffer(rows, place))

    def from_device(rows: Array, place: int) -> torch.Tensor:
        return torch.from_numpy(rows).pin_memory()

    def case(load: Any) -> float:
        order = reading.globally(next(turn) // cases)  # the same samples in each case of a round

        def batches() -> Generator[torch.Tensor, None, None]:
            torch.set_num_threads(threads)
            for place in range(steps + SETTLING):
                chosen = order[np.arange(place * batch, (place + 1) * batch) % len(order)]
                yield load(reading.activations.rows_of(chosen), place)

        torch.set_num_threads(harness.cores())
        with prefetch(batches(), AHEAD) as loaded:
            started = 0.0
            for place, values in enumerate(loaded):
                if place == SETTLING:
                    _wait(device)
                    started = time.perf_counter()
                there = values.to(device, non_blocking=True)
                step(resident[there] if load is from_device else there)
            _wait(device)
            return time.perf_counter() - started

    compared = {
        "snapshots": lambda: {"s": case(from_snapshots)},
        "memory": lambda: {"s": case(from_memory)},
        "control": lambda: {"s": case(from_memory)},
    }
    if cuda:
        compared["device"] = lambda: {"s": case(from_device)}
    runs = harness.interleave(compared, rounds)
    seconds = {name: [run["s"] / steps for run in taken] for name, taken in runs.items()}

    def against(name: str, other: str) -> Json:
        return harness.summary([a / b for a, b in zip(seconds[name], seconds[other], strict=True)])

    return {
        "threads": threads,
        "batch_bytes": batch * reading.spec.bytes // reading.activations.samples,
        "seconds_per_step": {name: harness.summary(values) for name, values in seconds.items()},
        "ratio": against("snapshots", "memory"),
        "control": against("control", "memory"),
        **({"against device": against("snapshots", "device")} if cuda else {}),
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _map_step(reading: Reading, device: str) -> Any:
    """Forward and backward through a ResNet-18's next stage and a classifier."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    channels = reading.activations.field.shape[0]
    assert channels == 64
    path = nn.Sequential(model.layer2, model.avgpool, nn.Flatten(), nn.Linear(128, 10))
    return _step(path, device, lambda out: out.logsumexp(1).mean())


def _token_step(reading: Reading, device: str) -> Any:
    """Forward and backward through two gated MLPs of a decoder's shape over the batch's tokens."""
    width = reading.activations.field.shape[0]
    path = nn.Sequential(*(nn.Sequential(nn.Linear(width, 1536), nn.SiLU(), nn.Linear(1536, width)) for _ in range(2)))
    return _step(path, device, lambda out: out.square().mean())


def _step(path: nn.Module, device: str, loss: Any) -> Any:
    """float32 on a CPU; on a device bfloat16 by autocast, as one would train there."""
    path.to(device)
    optimizer = torch.optim.AdamW(path.parameters(), lr=1e-4, fused=device == "cuda")

    def step(values: torch.Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = path(values if device == "cuda" else values.float())
        loss(out.float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
