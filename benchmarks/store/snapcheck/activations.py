"""Real activations for the speed measurements: what our own chain code stores of SmolLM2 and of a ResNet.

A run's own nodes make them (data, weights, one boundary), in a process of its own. The figures do not depend on the
values, only on how many bytes there are and how they lie; so a part is computed and repeated until the set is full.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Json
from cache_store.formats.codec import Array, Field
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.open import open_storage

SHARD_BYTES = 32 << 20


@dataclass(frozen=True)
class Activations:
    """Samples of one kind: rows of a set, `starts[i]` to `starts[i + 1]` for sample `i`."""

    name: str
    field: Field
    #: Rows that were computed: (rows, *shape), bfloat16 as uint16; repeated as often as needed.
    part: Array
    #: int64 (samples + 1,) over the whole set.
    starts: Array

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    @property
    def samples(self) -> int:
        return len(self.starts) - 1

    @property
    def bytes(self) -> int:
        return self.rows * self.field.bytes

    def values(self, rows: range) -> Array:
        found: Array = self.part[np.arange(rows.start, rows.stop) % len(self.part)]
        return found

    def rows_of(self, samples: Array) -> Array:
        """The set's rows of these samples, in order."""
        first, lengths = self.starts[samples], self.starts[samples + 1] - self.starts[samples]
        ends = np.cumsum(lengths)
        return np.repeat(first - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)

    def cuts(self) -> Array:
        """First sample of every shard, and their number at the end."""
        limit = SHARD_BYTES // self.field.bytes
        found = [0]
        while found[-1] < self.samples:
            fits = int(np.searchsorted(self.starts, self.starts[found[-1]] + limit, side="right")) - 1
            found.append(max(found[-1] + 1, fits))
        return np.array(found).clip(max=self.samples)

    def spec(self, **key: Any) -> SetSpec:
        cuts = self.starts[self.cuts()].tolist()
        return SetSpec.ragged({"benchmark": self.name, **key}, (self.field,), 1, cuts)

    def store(self, folder: Path, **key: Any) -> SnapshotSet:
        """The whole set, in a store in this folder."""
        snapshots = SnapshotStore(open_storage(str(folder))).open(self.spec(**key))
        for shard in snapshots.missing():
            snapshots.put(shard, (self.values(snapshots.spec.shard_range(shard)),))
        return snapshots


def smollm2(size: int, folder: Path, *, quick: bool) -> Activations:
    """Hidden states after two layers of SmolLM2-135M over Python source: 576 bfloat16 a token, whole samples."""
    from benchmarks.language.lm_stage import model_of

    model = model_of()
    config = {
        "model": model["spec"],
        "data": {"name": "stdlib", "sequence_length": 128, "train_limit": 32 if quick else 512}
        | {"validation_limit": 8, "test_limit": 1},
        "split": {"base": 2, "head": 1, "train_base": False},
    }
    part, _ = _computed(config, folder / "smollm2")
    row = part[0].nbytes
    # Lengths of chats and documents, not of packed text: from a fifth to twice the packed 128.
    lengths = np.random.default_rng(0).integers(24, 257, size=max(8, size // (row * 140)))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Activations(f"hidden states, {model['name']}", Field("x", "bfloat16", part.shape[1:]), part, starts)


def resnet(size: int, folder: Path, options: argparse.Namespace, *, quick: bool) -> Activations:
    """Maps after the first stage of a ResNet-18 over CIFAR-10 at 32 pixels: 64 x 32 x 32 bfloat16 an image."""
    # Decoding CIFAR-10 takes longer than all that is quick.
    images = {"name": "digits", "flip": False} if quick else harness.image_data(options, folder)
    config = {
        "model": {"name": "resnet18", "stem": "small"},
        "data": {**images, "image_size": 32, "views": 1, "train_limit": 256 if quick else 1024, "test_limit": 64},
        "split": {"base": 1, "train_base": False},
    }
    part, shape = _computed(config, folder / "resnet")
    samples = max(8, size // part[0].nbytes)
    return Activations("maps, ResNet-18", Field("x", "bfloat16", shape), part, np.arange(samples + 1))


def _computed(config: Json, folder: Path) -> tuple[Array, tuple[int, ...]]:
    whole = {
        **config,
        "training": {"epochs": 1, "batch_size": 8, "precision": "bf16"},
        "regimes": {"segprop": {"kind": "segprop"}},
        "snapshots": {"mode": "always", "dtype": "bfloat16"},
        "evaluation": {"stages": False},
        "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": harness.cores()},
        "run_dir": str(folder / "run"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps(whole))
    found = harness.child("-m", "benchmarks.store.snapcheck.activations", str(folder / "config.yaml"))
    snapshots = SnapshotStore(open_storage(found["store"])).load(found["set"])
    part = np.concatenate(list(_shards(snapshots)))
    return part, snapshots.spec.fields[0].shape


def _shards(snapshots: SnapshotSet) -> Iterator[Array]:
    for shard in range(snapshots.spec.shards):
        yield snapshots.shard(shard)[0]


def make(config: str) -> Json:
    """Make one boundary with the nodes of a plan that it needs; where it is."""
    from cache_store.records.nodes import Commit, NodeStore
    from orchestrator.runs.prepare import prepare
    from workers.control import ThreadControl
    from workers.specs.orders import WorkOrder
    from workers.specs.results import MaterializeResult
    from workers.tasks.execute import execute

    prepared = prepare(config)
    plan, store = prepared.plan, prepared.config.store
    nodes = NodeStore(open_storage(store))

    def run(node: Any) -> Commit:
        parents = {role: run(plan.node(parent)) for role, parent in node.parents.items()}
        found = nodes.commit_of(node.id)
        order = WorkOrder(node.id, node.kind, node.task, parents, store, "cpu", harness.cores())
        commit = found or execute(order, ThreadControl())
        assert commit is not None
        return commit

    wanted = next(n for n in plan.nodes if n.kind == "materialize" and n.task["split"] == "train")
    return {"store": store, "set": run(wanted).read(MaterializeResult).set}


if __name__ == "__main__":
    print(json.dumps(make(sys.argv[1])))
