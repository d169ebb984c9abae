"""The same samples through LitData, MosaicML Streaming, Hugging Face datasets and WebDataset.

Each keeps whole samples as raw bytes, uncompressed, in chunks of our shards' size, reads them shuffled its own way in
one process without workers, and stacks or concatenates batches of the same samples into a tensor: what a training loop
needs. What is not installed is left out; `python -m benchmarks.store.snapcheck.others FOLDER` installs them apart.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Json
from benchmarks.store.snapcheck.activations import SHARD_BYTES
from benchmarks.store.snapcheck.reading import Reading
from benchmarks.store.snapcheck.timing import compare, timed

PACKAGES = ("litdata", "mosaicml-streaming", "webdataset")
#: What they import to read a local folder; torch, numpy and datasets are ours.
NEEDED: tuple[str, ...] = (
    "braceexpand",
    "lightning-utilities",
    "tifffile",
    "boto3",
    "botocore",
    "s3transfer",
    "jmespath",
)
NEEDED += ("python-snappy", "cramjam", "zstd", "Brotli", "catalogue")


def measure(reading: Reading, folder: Path, rounds: int) -> Json:
    """One warm epoch of each, after one that is not counted."""
    cases: dict[str, Callable[[], float]] = {}
    reader = reading.fresh()
    turn = iter(range(10**6))
    reading.epoch(reader, reading.globally(next(turn)))
    cases["ours"] = lambda: _epoch_of_ours(reading, reader, next(turn))
    missing = {}
    for name, make in MAKERS.items():
        if importlib.util.find_spec(name) is None:
            missing[name] = "not installed"
            continue
        place = folder / name
        try:
            epoch = make(reading, place)
        except ImportError as error:
            missing[name] = f"cannot be imported: {error}"
            continue
        epoch()
        cases[name] = partial(timed, epoch)
    found = compare(cases, reading.spec.bytes, rounds)
    for name in MAKERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    return {**found, **missing}


def _epoch_of_ours(reading: Reading, reader: Any, epoch: int) -> float:
    order = reading.globally(epoch)
    return timed(lambda: reading.epoch(reader, order))


def _samples(reading: Reading) -> Iterator[bytes]:
    made = reading.activations
    for sample in range(made.samples):
        yield made.values(range(int(made.starts[sample]), int(made.starts[sample + 1]))).tobytes()


def _batches(reading: Reading, samples: Iterator[Any]) -> int:
    """Concatenate the rows of `batch` samples at a time, as our gather does; samples seen."""
    width = reading.spec.row_bytes
    held: list[Any] = []
    seen = 0
    for sample in samples:
        held.append(np.frombuffer(sample, np.uint8).reshape(-1, width))
        seen += 1
        if len(held) == reading.batch:
            torch.from_numpy(np.concatenate(held))
            held = []
    if held:
        torch.from_numpy(np.concatenate(held))
    return seen


def _check(reading: Reading, seen: int) -> None:
    if seen != reading.activations.samples:
        raise SystemExit(f"{seen} of {reading.activations.samples} samples were read")


def _library(name: str) -> Any:
    """Import what may not be installed, without types."""
    return importlib.import_module(name)


def _litdata(reading: Reading, place: Path) -> Callable[[], None]:
    library, writers = _library("litdata"), _library("litdata.streaming.writer")
    writer = writers.BinaryWriter(str(place), chunk_bytes=SHARD_BYTES)
    for index, sample in enumerate(_samples(reading)):
        writer.add_item(index, sample)
    writer.done()
    writer.merge()
    data = library.StreamingDataset(str(place), shuffle=True)
    return lambda: _check(reading, _batches(reading, iter(data)))


def _streaming(reading: Reading, place: Path) -> Callable[[], None]:
    library = _library("streaming")
    with library.MDSWriter(out=str(place), columns={"x": "bytes"}, size_limit=SHARD_BYTES) as writer:
        for sample in _samples(reading):
            writer.write({"x": sample})
    data = library.StreamingDataset(local=str(place), shuffle=True, batch_size=reading.batch)
    return lambda: _check(reading, _batches(reading, (sample["x"] for sample in data)))


def _datasets(reading: Reading, place: Path) -> Callable[[], None]:
    datasets = _library("datasets")
    made = datasets.Dataset.from_generator(
        lambda: ({"x": sample} for sample in _samples(reading)),
        features=datasets.Features({"x": datasets.Value("large_binary")}),
        cache_dir=str(place),
    )
    turn = iter(range(10**6))
    return lambda: _check(reading, _batches(reading, (row["x"] for row in made.shuffle(seed=next(turn)))))


def _webdataset(reading: Reading, place: Path) -> Callable[[], None]:
    webdataset = _library("webdataset")
    place.mkdir()
    pattern = str(place / "%06d.tar")
    with contextlib.redirect_stdout(io.StringIO()), webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES) as writer:
        for index, sample in enumerate(_samples(reading)):
            writer.write({"__key__": f"{index:08d}", "x": sample})
    paths = [str(path) for path in sorted(place.iterdir())]
    data = webdataset.WebDataset(paths, shardshuffle=len(paths)).shuffle(1000)
    return lambda: _check(reading, _batches(reading, (sample["x"] for sample in data)))


MAKERS: dict[str, Callable[[Reading, Path], Callable[[], None]]] = {
    "litdata": _litdata,
    "streaming": _streaming,
    "datasets": _datasets,
    "webdataset": _webdataset,
}


if __name__ == "__main__":
    uv = [sys.executable, "-m", "uv", "pip", "install", "--target", sys.argv[1], "--no-deps", *PACKAGES, *NEEDED]
    sys.exit(subprocess.run(uv, check=False).returncode)
