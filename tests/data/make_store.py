"""Writes the small store that is kept in the tests, one of everything a store holds:

    python tests/data/make_store.py tests/data/store-v1

Run it once for a new format and keep what it wrote: a store that is made anew proves nothing about old ones.
`test_store_v1.py` says what must be read from it, without this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from cache_store.formats import codec
from cache_store.formats.codec import Field
from cache_store.formats.encoded_rows import EncodedRows
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from orchestrator.costs.formulas import Estimate
from orchestrator.execution.plan_record import write_plan
from orchestrator.plan.graph import Node, Plan

ROWS = 10


def ramp(count: int, *shape: int) -> np.ndarray:
    """0, 1, 2, … as float32."""
    return np.arange(count * int(np.prod(shape)), dtype=np.float32).reshape(count, *shape)


def put(snapshots: SnapshotStore, spec: SetSpec, arrays: list[np.ndarray]) -> str:
    target = snapshots.open(spec)
    for i in range(spec.shards):
        rows = spec.shard_range(i)
        target.put(i, [array[rows.start : rows.stop] for array in arrays])
    return spec.id


def main(folder: str) -> None:
    storage = open_storage(folder)
    snapshots, nodes = SnapshotStore(storage), NodeStore(storage)

    maps = Field("x", "bfloat16", (2, 3, 3)), Field("label", "int64", ())
    bits = torch.from_numpy(ramp(ROWS, 2, 3, 3) - 50).bfloat16().view(torch.uint16).numpy()
    labels = np.arange(ROWS, dtype=np.int64) ** 3
    sets = [put(snapshots, SetSpec({"what": "plain"}, ROWS, maps, 2, 4), [bits, labels])]

    hidden = (Field("x", "float32", (5,)),)
    tokens = SetSpec.ragged({"what": "ragged"}, hidden, 1, (0, 3, 9, ROWS))
    sets.append(put(snapshots, tokens, [-ramp(ROWS, 5)]))

    awkward = ramp(ROWS, 2, 3, 3).view(np.uint32) ^ 0x80000000
    awkward[3, 0, 0] = [0x7FC12345, 0xFF800000, 0x00000001]  # a NaN's payload, -inf, the smallest number
    fields = (Field("x", "float32", (2, 3, 3)), Field("label", "int64", ()))
    packed = SetSpec({"what": "lossless"}, ROWS, fields, 2, 4, codec_version=codec.PACKED)
    sets.append(put(snapshots, packed, [awkward.view(np.float32), labels]))

    for name, shape in (("int8", (40,)), ("int8", (2, 3, 3)), ("fp8", (40,))):
        encoding = EncodedRows(name, (Field("x", "bfloat16", shape),))
        stored = encoding.encode([torch.from_numpy(ramp(ROWS, *shape) - 50).bfloat16()])
        arrays = [(t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t).numpy() for t in stored]
        key = {"what": f"{name} {'maps' if len(shape) == 3 else 'rows'}"}
        sets.append(put(snapshots, SetSpec(key, ROWS, encoding.fields, 2, 4), arrays))

    finished = nodes.attempt("0" * 32)
    finished.write("head.safetensors", b"weights of a head")
    finished.commit({"stage": "stage1", "sets": sets})
    killed = nodes.attempt("1" * 32)
    killed.checkpoint({"model": b"half trained"}, (2, 7), {"loss": 0.125})

    made = Node("0" * 32, "train", "segprop/stage1", ("segprop",), {}, {}, Estimate())
    rest = Node("1" * 32, "train", "segprop/stage2", ("segprop",), {}, {"optimizer": made.id}, Estimate())
    write_plan(storage, "kept", Plan((made, rest), (rest.id,), {}))


if __name__ == "__main__":
    main(sys.argv[1])
