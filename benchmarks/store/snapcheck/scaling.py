"""What a sample costs as sets grow, and what the reader holds of a set ten times its limit."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Json
from cache_store.formats.codec import Field
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.shard_cache import ShardCache
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.open import open_storage
from workers.training.memory import settled_private_bytes
from workers.training.shuffle import epoch_order, windowed_order

BATCH = 256
#: Epochs after the first, of which the fastest counts.
LATER = 6


def _filled(folder: Path, rows: int, shard_rows: int, width: int) -> SnapshotSet:
    spec = SetSpec({"rows": rows, "shard": shard_rows}, rows, (Field("x", "uint8", (width,)),), 1, shard_rows)
    snapshots = SnapshotStore(open_storage(str(folder))).open(spec)
    for shard in snapshots.missing():
        snapshots.put(shard, (np.full((len(spec.shard_range(shard)), width), shard % 251, np.uint8),))
    return snapshots


def _per_sample(snapshots: SnapshotSet, samples: int) -> Json:
    """Microseconds a sample, globally shuffled: of the first epoch (opening and checking), and of a later one."""
    reader = RowReader(SnapshotSet(snapshots.storage, snapshots.spec))
    found = []
    for epoch in range(1 + LATER):
        order = epoch_order(0, epoch, snapshots.spec.rows)[:samples]
        started = time.perf_counter()
        if epoch == 0:
            for shard in range(snapshots.spec.shards):
                snapshots.touch(shard)
        for start in range(0, len(order), BATCH):
            reader.gather(order[start : start + BATCH])
        found.append(1e6 * (time.perf_counter() - started) / len(order))
    return {"first": found[0], "later": min(found[1:])}


def flatness(folder: Path, *, quick: bool) -> Json:
    """Samples of 4 KiB in 16 shards, 10^3 to 10^6 of them (quick: 10^5); 10^4 samples in 10 to 10^4 shards (10^3)."""
    results: Json = {"samples": {}, "shards": {}}
    for samples in (1_000, 10_000, 100_000) if quick else (1_000, 10_000, 100_000, 1_000_000):
        snapshots = _filled(folder / "samples", samples, -(-samples // 16), 4096)
        results["samples"][samples] = _per_sample(snapshots, min(samples, 50_000))
        shutil.rmtree(folder / "samples")
    for shards in (10, 100, 1_000) if quick else (10, 100, 1_000, 10_000):
        snapshots = _filled(folder / "shards", 10_000, 10_000 // shards, 4096)
        results["shards"][shards] = _per_sample(snapshots, 10_000)
        shutil.rmtree(folder / "shards")
    return results


def memory(folder: Path, limit: int) -> Json:
    """Growth of a process that reads a set of ten times `limit` by windows: private bytes, and mapped file bytes. Over
    storage that cannot be mapped too, where everything held is private."""
    results = {}
    for name in ("folder", "unmapped"):
        kept = ShardCache(limit)
        shard_rows = limit // (1 << 16) // 8
        snapshots = _filled(folder / "memory", shard_rows * 80, shard_rows, 1 << 16)
        if name == "unmapped":
            snapshots.storage.local_path = lambda path: None  # type: ignore[method-assign]  # a storage that cannot be mapped
        source = SnapshotSet(snapshots.storage, snapshots.spec, kept)
        order = windowed_order(0, 0, [shard_rows] * 80, 4)
        reader = RowReader(source)
        out = reader.empty(64)
        out[0].zero_()
        before, mapped = settled_private_bytes(), _mapped_bytes()
        most_private = most_mapped = 0
        reader.expect(order // shard_rows, depth=2)
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            reader.gather(rows, tuple(tensor[: len(rows)] for tensor in out))
            if start % 1024 == 0:
                most_private = max(most_private, settled_private_bytes() - before)
                most_mapped = max(most_mapped, _mapped_bytes() - mapped)
        reader.forget()
        results[name] = {"limit": limit, "private": most_private, "mapped": most_mapped}
    return results


def _mapped_bytes() -> int:
    """Bytes of files in this process's page tables."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("flatness", "memory"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--limit", type=int, default=128 << 20)
    chosen = parser.parse_args(sys.argv[1:])
    with tempfile.TemporaryDirectory() as place:
        if chosen.what == "flatness":
            print(json.dumps(flatness(Path(place), quick=chosen.quick)))
        else:
            print(json.dumps(memory(Path(place), chosen.limit)))
