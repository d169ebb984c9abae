"""A store written by the first version with encodings stays readable: by us, and by Arrow and numpy alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cache_store.audit import Audit
from cache_store.formats import codec, packed
from cache_store.formats.codec import Field
from cache_store.formats.encoded_rows import EncodedRows
from cache_store.keys import digest_json
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.reader import RowReader
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from cache_store.storage.base import Storage
from cache_store.storage.open import existing_storage
from orchestrator.execution.plan_record import read_plans

KEPT = Path(__file__).parents[2] / "data" / "store-v1"
IDS = {
    "plain": "2e77f6f31d42da09ed66330a8281284c",
    "ragged": "08c32ab3c4cf662468b92c15fe8455a8",
    "lossless": "2129926f59670128b9c350042eeb56e4",
    "int8 rows": "6d62087c62f7c67a0a5bc4599ee4e2e9",
    "int8 maps": "2e64d1e0705189d621133579ec75774a",
    "fp8 rows": "bed4afdf14aaace99be1256ddfa34436",
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A copy, since opening a store tries it out."""
    shutil.copytree(KEPT, tmp_path / "store")
    return existing_storage(str(tmp_path / "store"))


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def opened(storage: Storage, what: str) -> SnapshotSet:
    return SnapshotStore(storage).load(IDS[what])


def whole(snapshots: SnapshotSet) -> list[torch.Tensor]:
    return list(RowReader(snapshots).gather(np.arange(snapshots.spec.rows)))


def test_every_set_is_found_under_the_id_that_its_content_had_then(storage: Storage) -> None:
    found = {info.key["what"]: info for info in SnapshotStore(storage).list()}
    assert {what: info.id for what, info in found.items()} == IDS
    assert all(info.shards_present == info.shards == 3 for info in found.values())
    assert list(Audit(storage).run()) == []


def test_values_are_what_was_written(storage: Storage) -> None:
    x, label = whole(opened(storage, "plain"))
    assert torch.equal(x.float(), torch.from_numpy(ramp(10, 2, 3, 3) - 50))
    assert label.tolist() == [row**3 for row in range(10)]

    ragged = opened(storage, "ragged")
    assert [len(ragged.spec.shard_range(i)) for i in range(3)] == [3, 6, 1]
    assert torch.equal(whole(ragged)[0], torch.from_numpy(-ramp(10, 5)))

    x, label = whole(opened(storage, "lossless"))
    bits = ramp(10, 2, 3, 3).view(np.uint32) ^ 0x80000000
    bits[3, 0, 0] = [0x7FC12345, 0xFF800000, 0x00000001]
    assert (x.numpy().view(np.uint32) == bits).all()
    assert label.tolist() == [row**3 for row in range(10)]


@pytest.mark.parametrize(("what", "name", "shape"), [
    ("int8 rows", "int8", (40,)),
    ("int8 maps", "int8", (2, 3, 3)),
    ("fp8 rows", "fp8", (40,)),
])  # fmt: skip
def test_codes_decode_to_the_values_they_stood_for(
    storage: Storage, what: str, name: Any, shape: tuple[int, ...]
) -> None:
    snapshots = opened(storage, what)
    encoding = EncodedRows(name, (Field("x", "bfloat16", shape),))
    assert snapshots.spec.fields == encoding.fields
    (found,) = encoding.decode(whole(snapshots))
    values = torch.from_numpy(ramp(10, *shape) - 50).bfloat16()
    # By arithmetic of its own: what the codes and scales in the file come to.
    code, scale = whole(snapshots)
    blocks = 32 if len(shape) == 1 and name == "int8" else 128
    by_value = scale[:, :, None, None] if len(shape) == 3 else scale.repeat_interleave(blocks, 1)[:, : shape[0]]
    assert torch.equal(found, (code.float() * by_value).bfloat16())
    assert ((found.float() - values.float()).abs() <= values.float().abs() / 14 + by_value / 2 * (name == "int8")).all()
    assert torch.equal(found[0].flatten()[:1], torch.tensor([-50.0]).bfloat16())
    # And encoding the same values today gives the same bytes.
    again = encoding.encode([values])
    assert all(torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(again, (code, scale), strict=True))


def test_plain_shards_are_written_as_they_were(storage: Storage) -> None:
    """Codec 1 to the byte. (Another pyarrow may frame the columns differently; then only reading must go on.)"""
    for what in ("plain", "ragged"):
        snapshots = opened(storage, what)
        for i in range(3):
            (file,) = (KEPT / "sets" / IDS[what] / "shards").glob(f"{i:06d}.*")
            pieces = codec.encode(snapshots.spec.fields, snapshots.shard(i))
            assert b"".join(bytes(piece) for piece in pieces) == file.read_bytes()


def test_nodes_checkpoints_and_plans_are_read(storage: Storage) -> None:
    nodes = NodeStore(storage)
    commit = nodes.commit_of("0" * 32)
    assert commit is not None
    assert commit.result == {"stage": "stage1", "sets": list(IDS.values())}
    assert nodes.read_file(commit.files["head.safetensors"]) == b"weights of a head"
    left = nodes.latest_checkpoint("1" * 32)
    assert left is not None
    assert (left.position, left.data) == ((2, 7), {"loss": 0.125})
    assert nodes.read_file(left.files["model"]) == b"half trained"
    (plan,) = read_plans(storage).values()
    assert (plan.run, plan.targets) == ("kept", frozenset({"1" * 32}))
    assert plan.nodes["1" * 32].parents == ("0" * 32,)


# Without any code of ours but what reads JSON: docs/FORMAT.md, followed to the letter


def columns(what: str) -> tuple[dict[str, Any], list[tuple[int, dict[str, bytes]]]]:
    """set.json, and of every shard its rows and the bytes of its columns."""
    root = KEPT / "sets" / IDS[what]
    spec = json.loads((root / "set.json").read_text())
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(canonical).hexdigest()[:32] == IDS[what] == digest_json(spec)
    shards = []
    for path in sorted((root / "commits").iterdir()):
        record = json.loads(path.read_text())
        data = (KEPT / record["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record["bytes"], record["sha256"])
        table = pa.ipc.open_file(data).read_all()
        assert table.schema.metadata[b"segprop.codec"] == str(spec["codec"]).encode()
        shards.append(
            (record["rows"], {name: b"".join(table[name].to_pylist()) for name in table.column_names}),
        )
    return spec, shards


def test_a_plain_and_a_ragged_shard_need_nothing_but_arrow() -> None:
    _, shards = columns("plain")
    bits = np.frombuffer(b"".join(shard["x"] for _, shard in shards), np.uint16).astype(np.uint32) << 16
    assert (bits.view(np.float32) == ramp(180) - 50).all()
    assert np.frombuffer(shards[2][1]["label"], "<i8").tolist() == [512, 729]
    spec, shards = columns("ragged")
    assert spec["cuts"] == [0, 3, 9, 10]
    assert [rows for rows, _ in shards] == [3, 6, 1]
    assert (np.frombuffer(b"".join(shard["x"] for _, shard in shards), "<f4") == -ramp(50)).all()


def test_a_packed_shard_needs_arrow_and_zstd() -> None:
    spec, shards = columns("lossless")
    assert spec["codec"] == 2
    values = []
    for rows, shard in shards:
        planes = [pa.Codec("zstd").decompress(shard[f"x.{k}"], rows * 18, asbytes=True) for k in range(4)]
        values.append(np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1).reshape(-1).view("<u4"))
    bits = ramp(180).view(np.uint32) ^ 0x80000000
    bits[3 * 18 : 3 * 18 + 3] = [0x7FC12345, 0xFF800000, 0x00000001]
    assert (np.concatenate(values) == bits).all()


def test_quantized_shards_are_codes_times_scales() -> None:
    spec, shards = columns("int8 rows")
    assert [field["name"] for field in spec["fields"]] == ["x.code", "x.scale"]
    _, first = shards[0]
    code = np.frombuffer(first["x.code"], np.int8).reshape(4, 40).astype(np.float32)
    scale = np.frombuffer(first["x.scale"], "<f4").reshape(4, 2)
    # Rounded to bfloat16 before they were coded: steps of up to 1 below 256.
    assert np.abs(code * np.repeat(scale, 32, axis=1)[:, :40] - (ramp(4, 40) - 50)).max() <= scale.max() / 2 + 0.5
    _, shards = columns("int8 maps")
    code = np.frombuffer(shards[0][1]["x.code"], np.int8).reshape(4, 2, 3, 3).astype(np.float32)
    scale = np.frombuffer(shards[0][1]["x.scale"], "<f4").reshape(4, 2, 1, 1)
    assert np.abs(code * scale - (ramp(4, 2, 3, 3) - 50)).max() <= scale.max() / 2


def test_packing_today_gives_what_unpacks_to_the_same() -> None:
    _, shards = columns("lossless")
    fields = (Field("x", "float32", (2, 3, 3)), Field("label", "int64", ()))
    for rows, _ in shards:
        arrays = [ramp(rows, 2, 3, 3), np.arange(rows, dtype=np.int64)]
        data = b"".join(bytes(piece) for piece in packed.encode(fields, arrays))
        assert all((a == b).all() for a, b in zip(packed.decode(data, fields, rows), arrays, strict=True))
