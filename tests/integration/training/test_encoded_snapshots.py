"""Whole stages on encoded snapshots: hit or miss, rolled forward or from the start, the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import LLAMA, lm_changes
from running import DEVICE, Lab, checksums, digests
from shard_damage import flip, shard_files

from cache_store.snapshots.store import SnapshotStore

IMAGES = ("segprop/stage3-seg3", "segprop/snapshot seg2 train view 0")
TEXT = ("segprop/stage3-layer2", "segprop/snapshot layer1 train view 0")
CASES = [("images", "lossless"), ("images", "int8"), ("text", "lossless"), ("text", "int8"), ("text", "fp8")]


def changes(kind: str, encoding: str, folder: Path) -> dict[str, Any]:
    if kind == "images":
        return {"training.epochs": 1, "training.precision": "bf16", "snapshots.encoding": encoding}
    return {
        **lm_changes(folder),
        "model.config": {**LLAMA, "num_hidden_layers": 4},
        "data.pack": False,
        "training.precision": "bf16",
        "snapshots": {"group_rows": 4, "shard_bytes": 12_000, "encoding": encoding, "mode": "always"},
    }


@pytest.mark.parametrize(("kind", "encoding"), CASES)
def test_a_stage_on_encoded_snapshots_ends_with_the_same_bits_on_hit_and_on_miss(
    kind: str, encoding: str, tmp_path: Path
) -> None:
    stage, read = IMAGES if kind == "images" else TEXT
    lab = Lab.make(tmp_path, {"snapshots.mode": "always", **changes(kind, encoding, tmp_path)})
    hit = lab.run(stage)
    assert hit.result["snapshot"]["misses"] == 0
    before = checksums(lab.snapshots(read))
    spec = lab.snapshots(read).spec
    assert spec.codec_version == (2 if encoding == "lossless" else 1)
    stored = lab.commit(read).result["bytes"]
    assert stored <= spec.bytes * 1.5, "what is told is what lies in the store, headers included"
    # One shard damaged: rebuilt from the set before. Then no set at all: everything from the start.
    lab.forget(stage)
    flip(shard_files(lab.snapshots(read))[0])
    damaged = lab.run(stage)
    lab.forget(stage)
    for node in lab.prepared.plan.sets:
        commit = lab.nodes.commit_of(node.id)
        if commit is not None:
            SnapshotStore(lab.storage).drop(commit.result["set"])
    lost = lab.run(stage)
    for commit in (damaged, lost):
        assert commit.result["snapshot"]["misses"] > 0
        assert digests(commit) == digests(hit)
    assert checksums(lab.snapshots(read)) == before


def test_lossless_snapshots_train_the_weights_of_plain_ones_in_fewer_bytes(tmp_path: Path) -> None:
    stage, read = IMAGES
    plain = Lab.make(tmp_path / "plain", changes("images", "plain", tmp_path) | {"snapshots.mode": "always"})
    packed = Lab.make(tmp_path / "packed", changes("images", "lossless", tmp_path) | {"snapshots.mode": "always"})
    assert digests(plain.run(stage)) == digests(packed.run(stage))
    assert packed.commit(read).result["bytes"] < 0.95 * plain.commit(read).result["bytes"]


def test_the_next_hop_is_computed_from_decoded_rows(tmp_path: Path) -> None:
    """Not from the values that were encoded: on a miss those would be gone."""
    from workers.control import ThreadControl
    from workers.domains.registry import domain_of
    from workers.environment import WorkerEnvironment
    from workers.snapshots.boundary import StoredBoundary
    from workers.specs.as_json import from_json
    from workers.specs.tasks import MaterializeTask
    from workers.weights import Weights

    lab = Lab.make(tmp_path, changes("text", "int8", tmp_path))
    _, read = TEXT
    lab.run(read)
    node = lab.node(read)
    task = from_json(MaterializeTask, node.task)
    environment = WorkerEnvironment(lab.storage, DEVICE, 1, ThreadControl(), 0.0)
    domain = domain_of(task.experiment)
    parents = {role: lab.nodes.commit_of(parent) for role, parent in node.parents.items()}
    source = domain.source(parents["data"], environment.snapshots, "train")  # type: ignore[index]
    weights = Weights(environment.nodes, parents, domain, environment.device)  # type: ignore[arg-type]
    boundary = StoredBoundary(environment, domain, task.boundary, source, weights, 0)
    before = boundary._previous
    assert before is not None
    rows = before._group(0)
    (decoded,) = before.encoding.decode(rows)
    block = weights.build(task.boundary.hops[-1][0])
    chosen = domain.rows(source, torch.arange(4).numpy())
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        batch = domain.batch(chosen, (decoded,), stored=True, device=DEVICE, precision="bf16")
        block.eval()
        expected = domain.to_rows(block(batch.boundary, batch.context), batch)
    stored = boundary.encoding.encode([tensor.to(torch.bfloat16) for tensor in expected])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(boundary._group(0), stored, strict=True))
