"""A training step fed from snapshots beside the same step fed from one tensor in memory."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import Json
from benchmarks.snapcheck.reading import Reading
from cache_store.codec import Array
from cache_store.prefetch import prefetch

AHEAD = 2
SETTLING = 2


def measure(reading: Reading, kind: str, rounds: int, *, steps: int = 8) -> Json:
    """Seconds of steps in turns, batches loaded ahead in the background in both cases, all cores for the step."""
    whole = reading.in_memory()
    reader = reading.fresh()
    for shard in range(reading.spec.shards):
        reader.snapshots.touch(shard)
    batch = 32 if kind == "maps" else 8
    step = _map_step(reading) if kind == "maps" else _token_step(reading)
    buffers = [(torch.zeros_like(whole[: 300 * batch]),) for _ in range(AHEAD + 2)]
    turn = iter(range(10**6))

    def from_snapshots(rows: Array, place: int) -> torch.Tensor:
        return reader.gather(rows, buffers[place % len(buffers)])[0]

    def from_memory(rows: Array, place: int) -> torch.Tensor:
        out = buffers[place % len(buffers)][0][: len(rows)]
        return torch.index_select(whole, 0, torch.from_numpy(rows), out=out)

    def case(load: Any) -> float:
        order = reading.globally(next(turn) // 3)  # the same samples in each case of a round

        def batches() -> Generator[torch.Tensor, None, None]:
            torch.set_num_threads(1)
            for place in range(steps + SETTLING):
                chosen = order[place * batch : (place + 1) * batch]
                yield load(reading.activations.rows_of(chosen), place)

        torch.set_num_threads(harness.cores())
        with prefetch(batches(), AHEAD) as loaded:
            started = 0.0
            for place, values in enumerate(loaded):
                if place == SETTLING:
                    started = time.perf_counter()
                step(values)
            return time.perf_counter() - started

    runs = harness.interleave(
        {
            "snapshots": lambda: {"s": case(from_snapshots)},
            "memory": lambda: {"s": case(from_memory)},
            "control": lambda: {"s": case(from_memory)},
        },
        rounds,
    )
    seconds = {name: [run["s"] / steps for run in taken] for name, taken in runs.items()}
    pairs = list(zip(seconds["snapshots"], seconds["memory"], seconds["control"], strict=True))
    return {
        "seconds_per_step": {name: harness.summary(values) for name, values in seconds.items()},
        "ratio": harness.summary([own / memory for own, memory, _ in pairs]),
        "control": harness.summary([control / memory for _, memory, control in pairs]),
    }


def _map_step(reading: Reading) -> Any:
    """Forward and backward through a ResNet-18's next stage and a classifier."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    channels = reading.activations.field.shape[0]
    assert channels == 64
    path = nn.Sequential(model.layer2, model.avgpool, nn.Flatten(), nn.Linear(128, 10))
    return _step(path, lambda values: values.float(), lambda out: out.logsumexp(1).mean())


def _token_step(reading: Reading) -> Any:
    """Forward and backward through two gated MLPs of a decoder's shape over the batch's tokens."""
    width = reading.activations.field.shape[0]
    path = nn.Sequential(*(nn.Sequential(nn.Linear(width, 1536), nn.SiLU(), nn.Linear(1536, width)) for _ in range(2)))
    return _step(path, lambda values: values.float(), lambda out: out.square().mean())


def _step(path: nn.Module, prepare: Any, loss: Any) -> Any:
    optimizer = torch.optim.AdamW(path.parameters(), lr=1e-4)

    def step(values: torch.Tensor) -> None:
        loss(path(prepare(values))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
