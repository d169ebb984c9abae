"""A plan made by the real planner, with commits nobody trained: material for what reads summaries."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

from cache_store.records.nodes import Commit
from orchestrator.config import load as configuration
from orchestrator.environment import Environment
from orchestrator.plan.builder import build_plan
from orchestrator.plan.graph import Node, Plan
from orchestrator.reports.record_json import to_json
from orchestrator.reports.summary import summarize
from workers.data.images.outline import DataOutline
from workers.models.resnet.outline import resnet_outline as outline

ENVIRONMENT = Environment(
    packages={"segprop": "0.1.0", "torch": "2.15.0", "ray": "2.60.0"},
    python="3.11.7",
    system="Linux 6.1",
    cpu="Example CPU @ 2.10GHz",
    cores=16,
    memory_bytes=128 << 30,
    git_commit="0123456789ab",
)
START = 1_790_000_000.0
#: What the data node of a chat came to.
TEXT_DATA: dict[str, Any] = {
    "rows": {"train": 240},
    "packed": False,
    "statistics": {
        "train": {
            "documents": {"count": 258, "min": 16, "max": 412, "mean": 120.0},
            "samples": {"count": 240, "min": 16, "max": 128, "mean": 93.2},
            "tokens": 22_320,
            "targets": 9_000,
            "truncated": 30,
            "dropped": 0,
            "empty": 2,
            "without_targets": 18,
        }
    },
    "warnings": ["18 of 258 samples (7.0 %) have no targets and are left out"],
}
#: The same in the words of terminal, plan, status and report.
TEXT_DATA_LINE = (
    "train 240 samples from 260 documents, 16 to 128 tokens (mean 93), 30 cut (the longest: 412 tokens), 18 without a "
    "target, 2 empty"
)


def make_plan(folder: Path, *, regimes: str = "[e2e, lw, segprop]", epochs: int = 8, views: int = 1) -> Plan:
    file = folder / "fake.yaml"
    file.write_text(
        "model: {name: resnet18, stem: small}\n"
        f"data: {{name: digits, image_size: 32, views: {views}}}\n"
        f"training: {{epochs: {epochs}, batch_size: 64}}\n"
        "snapshots: {mode: always}\n"
        f"regimes: {regimes}\n"
    )
    config = configuration.load(file)
    outlines = {name: outline(config.regime(name).model, config.data.image_size, 10) for name in config.regimes}
    values: dict[str, Any] = {
        "classes": 10,
        "class_names": tuple("0123456789"),
        "native": (1, 8, 8),
        "train_rows": 1437,
        "test_rows": 360,
        "fingerprint": "digits",
        "mean": (0.3,),
        "std": (0.3,),
    }
    known = DataOutline.__dataclass_fields__
    data = DataOutline(**{key: value for key, value in values.items() if key in known})
    return build_plan(config, outlines, data)


def make_commits(plan: Plan, *, cuda: bool = False, slots: int = 2) -> dict[str, Commit]:
    """One commit for every node, run on `slots` workers as early as its parents allow. Tests change its `result`."""
    ends: dict[str, float] = {}
    free = [START] * slots
    commits: dict[str, Commit] = {}
    for node in plan.nodes:
        seconds = 2.0 + 40.0 * node.estimate.flops / 3e12 if node.kind == "train" else 1.5
        earliest = max([START, *(ends[parent] for parent in node.parents.values())])
        slot = min(range(slots), key=lambda index: max(free[index], earliest))
        start = max(free[slot], earliest) + 0.2
        ends[node.id] = free[slot] = start + seconds
        where = {
            "host": "node-a",
            "pid": 4000 + slot,
            "device": f"cuda:{slot}" if cuda else "cpu",
            "threads": 1,
            "started": start,
            "finished": start + seconds,
        }
        result = {"seconds": seconds, "where": where, **_result(plan, node, seconds, cuda)}
        commits[node.id] = Commit(node.id, "a1", {}, result)
    return commits


def make_summary(folder: Path, **options: Any) -> dict[str, Any]:
    """A finished run's summary as JSON values, for tests to change; `summaries.read` makes it a `Summary`."""
    cuda = options.pop("cuda", False)
    plan = make_plan(folder, **options)
    summary = summarize(
        "fake",
        plan,
        make_commits(plan, cuda=cuda),
        status="done",
        environment=ENVIRONMENT,
        exports={name: f"model/{name}/model.safetensors" for name in plan.regimes},
    )
    return to_json(summary)


def _noise(*parts: object) -> float:
    return zlib.crc32(repr(parts).encode()) / 2**32 - 0.5


def _result(plan: Plan, node: Node, seconds: float, cuda: bool) -> dict[str, Any]:
    counters = {"hits": 0, "misses": 0, "bytes_read": 0, "bytes_written": 0}
    rows = {"train": 1293, "validation": 144, "test": 360}
    if node.kind == "data":
        return {"train": "s1", "test": "s2", "digest": "d", "rows": {"train": 1437, "test": 360}}
    if node.kind == "materialize":
        count = rows[node.task["split"]]
        last = node.task["boundary"]["hops"][-1]
        stored = node.estimate.snapshot_bytes
        return {
            "set": f"set-{node.id[:6]}",
            "rows": count,
            "bytes": stored,
            "forwards": dict.fromkeys(last, count),
            "snapshot": {**counters, "bytes_written": stored},
        }
    kind = plan.regimes[node.regimes[0]].kind if node.regimes else "e2e"
    ceiling = {"e2e": 0.985, "lw": 0.955, "segprop": 0.978}[kind]
    if node.kind == "evaluate":
        depth = 0.3 if "stage1" in node.label else 0.0
        accuracy = ceiling - depth + 0.01 * _noise(node.label)
        return {
            "metrics": {"loss": 1.2 * (1 - accuracy), "accuracy": accuracy},
            "rows": rows[node.task["split"]],
        }
    if node.kind != "train":
        return {"digest": "d"}
    return _train_result(node, seconds, cuda, ceiling, counters)


def _train_result(node: Node, seconds: float, cuda: bool, ceiling: float, counters: dict[str, int]) -> dict[str, Any]:
    epochs = node.task["train"]["epochs"]
    peak = int(node.estimate.peak_bytes * (1.05 + 0.2 * _noise(node.label)))
    baseline = 420 << 20
    curve = []
    # A round's commit holds its stage's epochs so far.
    for epoch in range((node.task.get("round") or {"end": epochs})["end"]):
        rise = 1 - math.exp(-2.5 * (epoch + 1) / epochs)
        accuracy = 0.35 + (ceiling - 0.35) * rise + 0.03 * _noise(node.label, epoch)
        curve.append(
            {
                "epoch": epoch,
                "train_loss": 2.2 * (1 - rise) + 0.05,
                "train_accuracy": min(1.0, accuracy + 0.01),
                "validation_loss": 2.1 * (1 - rise) + 0.12 + 0.05 * _noise(node.label, "loss", epoch),
                "validation_accuracy": min(1.0, accuracy),
                "lr": 3e-4 * (1 - epoch / epochs),
                "seconds": seconds / epochs,
                "images_per_s": 1293 / (seconds / epochs),
                "peak_device_bytes": peak if cuda else None,
                "peak_device_reserved_bytes": int(peak * 1.2) if cuda else None,
                "peak_host_bytes": baseline + peak,
            }
        )
    best = max(range(len(curve)), key=lambda epoch: curve[epoch]["validation_accuracy"])
    path = node.task["path"]
    reads = node.task["source"] == "snapshots"
    return {
        "stage": node.task["name"],
        "parts": {part: {"file": f"{part}.safetensors", "digest": "d", "bytes": 1} for part in node.task["trained"]},
        "epochs": curve,
        "best_epoch": best,
        "committed_epoch": best,
        "exit": "epochs",
        "steps": epochs * 20,
        "path_is_auxiliary": "adapter" in path or "aux" in path,
        "trainable_parameters": node.estimate.trainable,
        "resident_bytes": node.estimate.parameters * 4,
        "peak_device_bytes": peak if cuda else None,
        "peak_device_reserved_bytes": int(peak * 1.2) if cuda else None,
        "peak_host_bytes": baseline + peak,
        "host_baseline_bytes": baseline,
        "snapshot": {**counters, "hits": 20 * epochs, "bytes_read": 40_000_000 * epochs} if reads else counters,
        "forwards": {},
        "resumed": 0,
    }
