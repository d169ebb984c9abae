"""Describe the machine of a run for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.reports.words import Json
from orchestrator.units import bytes_text


def environment_rows(environment: Json) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        label = key.replace("_", " ")
        if value in (None, "", [], {}):
            continue
        if key.endswith("_bytes") and isinstance(value, int | float):
            rows.append((label.removesuffix(" bytes"), bytes_text(value)))
        elif key == "gpus":
            rows.append(("GPUs", ", ".join(_gpu(gpu) for gpu in value)))
        elif isinstance(value, Mapping):
            rows.append((label, ", ".join(f"{name} {item}" for name, item in value.items() if item)))
        elif isinstance(value, list | tuple):
            rows.append((label, ", ".join(map(str, value))))
        else:
            rows.append((label, str(value)))
    return rows


def _gpu(gpu: Any) -> str:
    if not isinstance(gpu, Mapping):
        return str(gpu)
    return f"{gpu.get('name', '?')} ({bytes_text(gpu.get('memory_bytes'))})"


def machine_words(environment: Json) -> str:
    parts = [_gpu(gpu) for gpu in environment.get("gpus") or []]
    if environment.get("cpu"):
        cores = environment.get("cores")
        parts.append(f"{environment['cpu']}" + (f", {cores} core{'s' if cores > 1 else ''}" if cores else ""))
    if environment.get("memory_bytes"):
        parts.append(f"{bytes_text(environment['memory_bytes'])} memory")
    return " · ".join(parts)


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
