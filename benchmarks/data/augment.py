"""Images a second of the view pipeline, beside torchvision's own v2 transforms applied to one sample at a time.

Both turn CIFAR-shaped uint8 images (32x32) into normalised float batches with as many threads as there are cores,
in one process: resize, random resized crop, flip, and for `paper` RandAugment(2, 9) and random erasing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.harness import Report, Table

LEVELS = ("none", "light", "paper")
NATIVE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help="(16 32 64 224; quick 16 64)")
    parser.add_argument("--batch", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, help="of every single measurement (2; quick 0.3)")
    parser.add_argument("--repeats", type=int, help="(5; quick 3)")


def run(options: argparse.Namespace) -> Report:
    import torch

    torch.set_num_threads(harness.cores())
    sizes = options.sizes or ([16, 64] if options.quick else [16, 32, 64, 224])
    seconds = options.seconds or (0.3 if options.quick else 2.0)
    repeats = options.repeats or (3 if options.quick else 5)
    images = torch.randint(0, 256, (options.batch, 3, NATIVE, NATIVE), dtype=torch.uint8)
    rows, results = [], {}
    for size in sizes:
        for level in LEVELS:
            harness.say(f"{size} {level}")
            ours, theirs = _ours(level, size, images), _torchvision(level, size, images)
            rates: dict[str, list[Rate]] = {"ours": [], "torchvision": []}
            for make in (ours, theirs):
                make(0)  # tables and caches
            for index in range(repeats):
                rates["ours"].append(_rate(ours, options.batch, seconds, index))
                rates["torchvision"].append(_rate(theirs, options.batch, seconds, index))
            pairs = list(zip(rates["ours"], rates["torchvision"], strict=True))
            ratio = harness.summary(a.wall / b.wall for a, b in pairs)
            cpu_ratio = harness.summary(a.cpu / b.cpu for a, b in pairs)
            found: dict[str, Any] = {
                name: harness.summary(rate.wall for rate in found) for name, found in rates.items()
            }
            results[f"{level} {size}"] = {**found, "ratio": ratio, "cpu_ratio": cpu_ratio}
            rows.append(
                (
                    size,
                    level,
                    harness.spread(found["ours"]),
                    harness.spread(found["torchvision"]),
                    harness.spread(ratio),
                    harness.spread(cpu_ratio),
                )
            )
    return Report(
        title="images a second of the view pipeline",
        settings={"batch": options.batch, "threads": harness.cores(), "seconds": seconds, "native": NATIVE},
        results=results,
        tables=[
            Table(
                "Images a second", ("size", "augment", "this pipeline", "torchvision v2", "ratio", "by CPU time"), rows
            )
        ],
        notes=[
            "Each view of a sample is new in every batch, as with `views` larger than the number of epochs.",
            "By CPU time: images a second of processor time of all threads; other processes disturb it least.",
            "torchvision: v2 transforms on uint8 tensors, a call a sample, then one stack; no worker processes.",
        ],
    )


class Rate(NamedTuple):
    """Images a second of wall time and of processor time."""

    wall: float
    cpu: float


def _rate(make: Callable[[int], object], batch: int, seconds: float, index: int) -> Rate:
    """Over about this long, at least one batch; every call is another view."""
    count, started, used = 0, time.perf_counter(), time.process_time()
    while True:
        make(1 + index * 10_000 + count)
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return Rate(count * batch / elapsed, count * batch / max(time.process_time() - used, 1e-9))


def _ours(level: Any, size: int, images: Any) -> Callable[[int], object]:
    import numpy as np

    from workers.data.images.augment.augment import Augment

    resize = round(size * 256 / 224)
    augment = Augment(augment=level, native=NATIVE, resize=resize, size=size, flip=True, mean=MEAN, std=STD, seed=1)
    samples = np.arange(len(images))
    return lambda view: augment(images, samples, view)


def _torchvision(level: str, size: int, images: Any) -> Callable[[int], object]:
    import torch
    from torchvision.transforms import v2

    resize = v2.Resize(round(size * 256 / 224), antialias=True)
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    crop = [v2.RandomResizedCrop(size, scale=(0.6, 1.0), antialias=True), v2.RandomHorizontalFlip()]
    steps = {
        "none": [resize, v2.CenterCrop(size), *end],
        "light": [resize, *crop, *end],
        "paper": [
            resize,
            *crop,
            v2.RandAugment(2, 9),
            *end,
            v2.RandomErasing(0.25, scale=(0.02, 0.2), ratio=(0.3, 3.3)),
        ],
    }
    transform = v2.Compose(steps[level])
    return lambda view: torch.stack([transform(image) for image in images])
