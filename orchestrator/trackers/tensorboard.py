"""TensorBoard event files made from a summary: one folder a regime, epochs counted over all its stages.

The records are written with tensorboard's own protos and record writer; neither torch nor tensorflow is
imported. The files are a rendering of the commits: each call replaces the folder, and the same summary gives
the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

#: Field of an epoch -> tag.
TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "lr": "learning_rate",
    "images_per_s": "images_per_second",
    "samples_per_s": "samples_per_second",
    "peak_device_bytes": "memory/peak_device_bytes",
    "peak_device_reserved_bytes": "memory/peak_device_reserved_bytes",
    "peak_host_bytes": "memory/peak_host_bytes",
}
#: Metric of a whole model -> tag: of the assembled network after each stage, and of an epoch's own validation.
ASSEMBLED = {"accuracy": "accuracy/assembled", "loss": "loss/assembled", "perplexity": "perplexity/assembled"}
VALIDATION = {"perplexity": "perplexity/validation", "token_accuracy": "token_accuracy/validation"}


def write_tensorboard(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `<folder>/<regime>/events.out.tfevents.*`; what was in `folder` before is replaced as a whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    old = fresh.with_name(fresh.name + ".old")
    try:
        os.chmod(fresh, 0o755)
        for name, regime in summary["regimes"].items():
            if any(stage["curve"] for stage in regime["stages"]):
                _write_regime(fresh / name, regime)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_regime(folder: Path, regime: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    start = _started(regime["stages"][0])
    with (folder / f"events.out.tfevents.{int(start)}.segprop").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=start, file_version="brain.Event:2").SerializeToString())
        for event in _events(regime):
            writer.write(event.SerializeToString())
        writer.flush()


def _events(regime: Mapping[str, Any]) -> Iterator[Event]:
    """In order of the cumulative epoch, which counts from 1 over the whole regime."""
    step = 0
    for stage in regime["stages"]:
        when = _started(stage)
        for epoch in stage["curve"]:
            step += 1
            when += float(epoch.get("seconds") or 0.0)
            values = _values(epoch, TAGS) + _values(epoch.get("validation") or {}, VALIDATION)
            yield Event(wall_time=when, step=step, summary=Summary(value=values))
        whole = _values(stage["assembled"], ASSEMBLED)
        if whole and stage["curve"]:
            yield Event(wall_time=when, step=step, summary=Summary(value=whole))


def _values(metrics: Mapping[str, Any], tags: Mapping[str, str]) -> list[Summary.Value]:
    return [
        Summary.Value(tag=tag, simple_value=float(metrics[key]))
        for key, tag in tags.items()
        if metrics.get(key) is not None
    ]


def _started(stage: Mapping[str, Any]) -> float:
    return float((stage["where"] or {}).get("started") or 0.0)
