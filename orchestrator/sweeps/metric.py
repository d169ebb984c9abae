"""Define what the trials of a sweep are compared by: a figure of a trial's summary. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cache_store.records.nodes import Commit
from cache_store.suggest import did_you_mean
from orchestrator.reports.commit_view import CommitFigures
from orchestrator.reports.records import Summary
from orchestrator.reports.words import of_kind
from orchestrator.units import bytes_text, count_text, metric_text, seconds_text
from workers.domains.metrics import METRICS

MetricMode = Literal["max", "min"]

SPLITS = ("test", "validation")
#: Figures of a regime in summary.json, and how they are written.
FIGURES = {
    "seconds": seconds_text,
    "wall_seconds": seconds_text,
    "peak_device_bytes": bytes_text,
    "peak_host_bytes": bytes_text,
    "host_growth_bytes": bytes_text,
    "trainable_parameters": count_text,
}


@dataclass(frozen=True)
class Metric:
    """`split` is None where `name` is a figure of the regime itself."""

    regime: str
    split: str | None
    name: str
    mode: MetricMode

    @property
    def key(self) -> str:
        return ".".join(part for part in (self.regime, self.split, self.name) if part)

    @property
    def sign(self) -> int:
        return 1 if self.mode == "max" else -1

    def of(self, summary: Summary) -> float | None:
        """Return the figure in a trial's summary; None where it is not there (yet)."""
        regime = summary.regimes.get(self.regime)
        if regime is None:
            return None
        if self.split is None:
            value = getattr(regime, self.name)
        else:
            value = (regime.final.metrics if self.split == "test" else regime.final.validation).get(self.name)
        return None if value is None else float(value)

    def of_stage(self, commit: Commit) -> float | None:
        """Return the validation figure of a stage's commit at the epoch it kept: how a trial stands on its way."""
        epoch = CommitFigures.of(commit).at_commit
        value = (epoch.validation or {}).get(self.name, epoch.figure(f"validation_{self.name}"))
        return None if value is None else float(value)

    def better(self, value: float, other: float) -> bool:
        return self.sign * value > self.sign * other

    def written(self, value: float | None) -> str:
        if self.split is None:
            return FIGURES[self.name](value)
        return metric_text(self.name, value)


def parse(key: str | None, mode: MetricMode | None, regimes: Mapping[str, str], *, names: Sequence[str]) -> Metric:
    """Read `sweep.metric`. `regimes`: name -> kind; `names`: metrics of an evaluation, the default first. ValueError
    with what is allowed."""
    if key is None:
        regime = next((name for name, kind in regimes.items() if of_kind(kind).has_base), next(iter(regimes)))
        key = f"{regime}.validation.{names[0]}"
    regime, *rest = key.split(".")
    if regime not in regimes:
        raise ValueError(f"{key}: no regime {regime}{did_you_mean(regime, regimes)}; there are {', '.join(regimes)}")
    if len(rest) == 1 and rest[0] in FIGURES:
        return Metric(regime, None, rest[0], mode or "min")
    if len(rest) == 2 and rest[0] in SPLITS and rest[1] in names:
        return Metric(regime, rest[0], rest[1], mode or ("max" if METRICS[rest[1]].higher else "min"))
    raise ValueError(f"{key}: {_allowed(regime, rest, names)}")


def _allowed(regime: str, rest: Sequence[str], names: Sequence[str]) -> str:
    known = [*(f"{split}.{name}" for split in SPLITS for name in names), *FIGURES]
    wrong = ".".join(rest)
    return f"no such figure{did_you_mean(wrong, known)}; allowed after {regime}.: {', '.join(known)}"
