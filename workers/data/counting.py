"""How the preparation of a data set says how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ReportCount(Protocol):
    """Takes `done` of `total` things, which `unit` names. `workers.control.Control.progress` is one."""

    def __call__(self, *, done: int, total: int, unit: str) -> None: ...


@dataclass
class ProgressCounter:
    """Counts what is done and reports it. Set `done` to what needs no work; `add` reports."""

    report: ReportCount | None
    total: int
    unit: str
    done: int = 0

    def add(self, count: int) -> None:
        """Count `count` more, and report unless it is nothing."""
        self.done += count
        if self.report is not None and count:
            self.report(done=self.done, total=self.total, unit=self.unit)
