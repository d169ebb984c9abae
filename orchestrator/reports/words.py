"""Titles and status words that terminal, report and sweep pages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.regimes.table import REGIMES

Json = Mapping[str, Any]
TITLES = {kind: row.title for kind, row in REGIMES.items()}
KINDS = {kind: row.words for kind, row in REGIMES.items()}
TEXT_KINDS = {kind: row.text_words or row.words for kind, row in REGIMES.items()}
STATUS_WORDS = {
    "done": "finished",
    "reused": "finished earlier, reused",
    "failed": "failed",
    "stopped": "stopped; the same command goes on",
    "partial": "incomplete",
    "pending": "not started",
}


def titles(regimes: Mapping[str, Json]) -> dict[str, str]:
    """What to call each regime: the kind's own name where the regime is named after its kind."""
    return {name: TITLES.get(name, name) for name in regimes}


class MemoryBasis:
    """Which figure stands for peak memory: the device's where there is one, else growth of the process."""

    def __init__(self, summary: Json) -> None:
        stages = [stage for regime in summary["regimes"].values() for stage in regime["stages"]]
        self.device = any(stage["peak_device_bytes"] for stage in stages)
        self.key = "peak_device_bytes" if self.device else "host_growth_bytes"
        self.words = "peak device memory" if self.device else "peak host memory above idle"
        whole = [regime for regime in summary["regimes"].values() if regime["kind"] == "e2e"]
        baseline = next((regime for regime in whole if regime[self.key] and finished(regime)), None)
        self.reference: float | None = baseline[self.key] if baseline else None

    def of(self, item: Json) -> float | None:
        value = item[self.key]
        return None if value is None else float(value)

    def share(self, value: float | None) -> float | None:
        """Of the end-to-end peak."""
        return value / self.reference if value is not None and self.reference else None


def finished(regime: Json) -> bool:
    return regime["status"] in ("done", "reused")
