"""What an encoding of snapshots saves, what it costs, and what it does to the numbers.

Rows are real: hidden states of SmolLM2-135M (or a random model of its shape) behind three of its layers, and maps of
the ResNet that the quickstart trains. Final quality is that of whole SegProp runs of the quickstart and of
lm_quickstart, the same seeds with every encoding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table
from benchmarks.language.lm_stage import model_of

ENCODINGS = ("plain", "lossless", "int8", "fp8")
#: Layers of SmolLM2 before the boundary that is looked at.
DEPTHS = (1, 15, 28)
#: Times each direction is timed.
TIMES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, help="runs of each encoding (3; quick 1)")


def run(options: argparse.Namespace) -> Report:
    seeds = options.seeds or (1 if options.quick else 3)
    with harness.workspace() as folder:
        model = model_of()
        rows: Json = {}
        for depth in DEPTHS[1:2] if options.quick else DEPTHS:
            config = _write(folder / f"smollm2-{depth}", _smollm2(model["spec"], depth, 4 if options.quick else 16))
            rows[f"{model['name']}, {depth} layers"] = harness.child(
                "-m", "benchmarks.store.encodings", "states", str(config)
            )
        quality: Json = {}
        for name, kind in (("quickstart.yaml", "images"), ("lm_quickstart.yaml", "text")):
            for encoding in ENCODINGS:
                if (kind, encoding) == ("images", "fp8"):
                    continue
                found = [_quality(name, encoding, seed, folder, options.quick) for seed in range(seeds)]
                quality.setdefault(name, {})[encoding] = {
                    key: harness.summary(each[key] for each in found) for key in found[0]
                }
        maps = _write(folder / "maps", {**_config("quickstart.yaml", options.quick), "snapshots": _KEPT})
        rows |= harness.child("-m", "benchmarks.store.encodings", "maps", str(maps))
    worst = {
        encoding: max(found[encoding]["error"] for found in rows.values() if encoding in found)
        for encoding in ENCODINGS
    }
    return Report(
        title="encodings of snapshots",
        settings={"seeds": seeds, "threads of encoding and decoding": 1},
        results={"rows": rows, "quality": quality},
        tables=[
            Table(
                "Rows of real boundaries (bfloat16)",
                (
                    "boundary",
                    "encoding",
                    "bytes of plain",
                    "relative error",
                    "largest value / rms",
                    "encode GB/s",
                    "decode GB/s",
                ),
                [
                    (name, encoding, each["ratio"], each["error"], each["outlier"], each["encode"], each["decode"])
                    for name, found in rows.items()
                    for encoding, each in found.items()
                ],
            ),
            Table(
                "Whole SegProp runs",
                ("configuration", "encoding", "test accuracy", "test loss", "snapshot MB"),
                [
                    (
                        name,
                        encoding,
                        harness.spread(each["accuracy"]),
                        harness.spread(each["loss"]),
                        each["bytes"]["median"] / 1e6,
                    )
                    for name, found in quality.items()
                    for encoding, each in found.items()
                ],
            ),
        ],
        targets=[
            ("lossless changes no bit", f"relative error {worst['lossless']:g}", worst["lossless"] == 0),
            ("int8 and fp8 take at most 0.6 of bfloat16", *_ratio(rows)),
        ],
        notes=[
            "The relative error is the norm of the difference over the norm of the rows; GB/s are of bfloat16 rows."
        ],
    )


_KEPT = {"mode": "always", "retention": "keep"}


def _ratio(rows: Json) -> tuple[str, bool]:
    found = [each["ratio"] for boundary in rows.values() for name, each in boundary.items() if name in ("int8", "fp8")]
    return f"{min(found):.2f} to {max(found):.2f}", max(found) <= 0.6


def _write(folder: Path, config: Json) -> Path:
    import yaml

    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "run_dir": str(folder / "run")}, sort_keys=False))
    return path


def _config(name: str, quick: bool) -> Json:
    import yaml

    config: Json = yaml.safe_load((harness.ROOT / "configs" / name).read_text())
    if quick:
        config["training"]["epochs"] = 1
        config["data"] |= {"train_limit": 128, "test_limit": 64}
    return {
        **config,
        "regimes": ["segprop"],
        "resources": {"runner": "local", "device": "cpu", "threads": harness.cores()},
        "evaluation": {"stages": False},
    }


def _quality(name: str, encoding: str, seed: int, folder: Path, quick: bool) -> Json:
    harness.say(f"{name} {encoding} seed {seed}")
    config = _config(name, quick)
    config |= {"seed": seed, "snapshots": {"mode": "always", "encoding": encoding}}
    found = harness.orchestrate(config, folder / f"{name}-{encoding}-{seed}")
    regime = found.summary["regimes"]["segprop"]
    metrics = regime["final"]["metrics"]
    return {
        "accuracy": metrics["accuracy"],
        "loss": metrics["loss"],
        "bytes": sum(item["bytes"] for item in regime["snapshots"]),
    }


def _smollm2(model: Json, depth: int, samples: int) -> Json:
    return {
        "model": {**model, "master": "float32"},
        "data": {
            "name": "stdlib",
            "sequence_length": 256,
            "train_limit": samples,
            "validation_limit": 1,
            "test_limit": 1,
        },
        # The model as it came: nothing is trained before its first boundary is stored.
        "split": {"base": depth, "head": 1, "intermediate": "frozen", "train_base": False},
        "training": {"epochs": 1, "batch_size": samples, "precision": "bf16"},
        "snapshots": _KEPT,
        "regimes": ["segprop"],
        "resources": {"runner": "local", "device": "cpu", "threads": harness.cores()},
    }


# --- in a process of its own -------------------------------------------------------------------------------


def states(config: str) -> Json:
    """Figures of the first boundary that a stage reads; no stage is trained."""
    from benchmarks.language.lm_stage import order_of

    _, order = order_of(config, "segprop", 0)
    return _figures(order.store, order.parents["snapshot/train/0"].result["set"])


def maps(config: str) -> Json:
    """Figures of every boundary of a trained run."""
    from cache_store.records.nodes import NodeStore
    from cache_store.storage.open import open_storage
    from orchestrator.runs.prepare import prepare
    from orchestrator.runs.run_dir import claim_run_dir
    from orchestrator.runs.session import execute

    prepared = prepare(config)
    claim_run_dir(prepared)
    assert execute(prepared, quiet=True) == 0
    nodes = NodeStore(open_storage(prepared.config.store))
    found = {}
    for boundary in prepared.plan.regimes["segprop"].boundaries:
        commit = nodes.commit_of(boundary.sets[0])
        assert commit is not None
        found[f"ResNet-18, {boundary.label}"] = _figures(prepared.config.store, commit.result["set"])
    return found


def _figures(store: str, set_id: str) -> Json:
    import numpy as np
    import torch

    from cache_store.formats import packed
    from cache_store.formats.encoded_rows import EncodedRows
    from cache_store.snapshots.reader import RowReader
    from cache_store.snapshots.store import SnapshotStore
    from cache_store.storage.open import open_storage
    from workers.snapshots.boundary import to_numpy

    torch.set_num_threads(1)
    snapshots = SnapshotStore(open_storage(store)).load(set_id)
    fields, count = snapshots.spec.fields, min(snapshots.spec.rows, 4096)
    rows = [tensor.bfloat16() for tensor in RowReader(snapshots).gather(np.arange(count))]
    fields = tuple(type(field)(field.name, "bfloat16", field.shape) for field in fields)
    size = sum(tensor.nbytes for tensor in rows)
    found: Json = {}
    for name in ENCODINGS:
        if name == "fp8" and len(fields[0].shape) == 3:
            continue
        encoding = EncodedRows(name, fields)
        encoded, encode_s = _timed(lambda encoding=encoding: encoding.encode(rows))
        decoded, decode_s = _timed(lambda encoding=encoding, encoded=encoded: encoding.decode(encoded))
        stored = sum(tensor.nbytes for tensor in encoded)
        if name == "lossless":
            arrays = [to_numpy(tensor) for tensor in rows]
            pieces, encode_s = _timed(lambda arrays=arrays: packed.encode(fields, arrays))
            data = b"".join(bytes(piece) for piece in pieces)
            unpacked, decode_s = _timed(lambda data=data: packed.decode(data, fields, count))
            decoded = [torch.from_numpy(np.array(array)).view(torch.bfloat16) for array in unpacked]
            stored = len(data)
        wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(decoded, rows, strict=True))
        norm = sum(float(tensor.double().square().sum()) for tensor in rows)
        largest = max(float(tensor.abs().max()) for tensor in rows)
        found[name] = {
            "ratio": stored / size,
            "error": (wrong / norm) ** 0.5,
            "outlier": largest / (norm / sum(tensor.numel() for tensor in rows)) ** 0.5,
            # Plain rows are handed on as they are.
            "encode": None if name == "plain" else size / encode_s / 1e9,
            "decode": None if name == "plain" else size / decode_s / 1e9,
        }
    return found


def _timed(work: Any) -> tuple[Any, float]:
    """What it gives, and the shortest of some times in seconds."""
    work()
    taken = []
    for _ in range(TIMES):
        started = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - started)
    return result, min(taken)


if __name__ == "__main__":
    print(json.dumps({"states": states, "maps": maps}[sys.argv[1]](sys.argv[2])))
