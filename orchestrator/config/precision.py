"""Settle `training.precision: auto` before anything else is read: the one place where it becomes a precision.

What a plan and a store hold is always a precision that was settled, so a stage is the same node wherever it would come
out the same. The device is that of `resources`: see `planned_device`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from workers.specs.capability import Capability, cpu_capability

AUTO = "auto"
#: Compute capability of kinds of accelerators, as Ray names them, that are older than Ampere; all others are not.
OLDER: dict[str, tuple[int, int]] = {"K80": (3, 7), "P4": (6, 1), "P100": (6, 0), "V100": (7, 0), "T4": (7, 5)}


def settle(raw: dict[str, Any]) -> None:
    """Replace every `precision: auto` of a raw configuration, in place, by what the planned device computes in. What
    is no section is left for the checks that follow."""
    asked = [training for training in _trainings(raw) if training.get("precision") == AUTO]
    if asked:
        best = planned_device(_section(raw, "resources")).best
        for training in asked:
            training["precision"] = best


def planned_device(resources: Mapping[str, Any]) -> Capability:
    """What is known of the device that a run will train on, from `resources` and, where these leave it open, from this
    machine.

    `device: cpu`, or `auto` on a machine without a GPU: this machine's CPU. `device: cuda`, or `auto` beside a GPU or
    with an `accelerator`: the kind of accelerator that is named, else this machine's oldest GPU, else one that computes
    in all precisions."""
    device, accelerator = resources.get("device", AUTO), resources.get("accelerator")
    if device == "cpu" or (device == AUTO and accelerator is None and not has_gpu()):
        return cpu_capability()
    if isinstance(accelerator, str):
        return Capability("cuda", version=OLDER.get(accelerator.split("-")[-1].upper()))
    return Capability("cuda", version=_oldest_gpu() if has_gpu() else None)


def has_gpu() -> bool:
    """Whether this machine has a GPU. Asking torch would take seconds."""
    return os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""


@cache
def _oldest_gpu() -> tuple[int, int] | None:
    """The least compute capability among this machine's GPUs; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = [line.strip().split(".") for line in said.splitlines()]
    versions = [(int(parts[0]), int(parts[1])) for parts in found if len(parts) == 2 and "".join(parts).isdigit()]
    return min(versions, default=None)


def _trainings(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every section of a raw configuration that may say `precision`."""
    yield _section(raw, "training")
    regimes = raw.get("regimes")
    for regime in regimes.values() if isinstance(regimes, dict) else ():
        if isinstance(regime, dict):
            yield _section(regime, "training")
            yield from (stage for stage in _section(regime, "stages").values() if isinstance(stage, dict))


def _section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, dict) else {}
