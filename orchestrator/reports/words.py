"""Define the titles, colours and status words that terminal, report and sweep pages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.regimes.table import REGIMES, RegimeKind
from orchestrator.reports.records import DataSummary, RegimeSummary, SplitSummary, StageSummary, Summary
from orchestrator.units import count_text

#: Status of a run, a regime or a node -> what people read.
STATUS_WORDS = {
    "done": "finished",
    "reused": "finished earlier, reused",
    "failed": "failed",
    "stopped": "stopped; the same command goes on",
    "partial": "incomplete",
    "pending": "not started",
}
#: The same of a sweep, and of a trial.
SWEEP_WORDS = {"done": "finished", "failed": "some trials failed", "stopped": "stopped; the same command goes on"}
TRIAL_WORDS = {
    "done": "finished",
    "stopped": "stopped by the scheduler",
    "failed": "failed",
    "running": "interrupted",
    "waiting": "not started",
}
#: State of a run -> what `segprop status` says, where that is not the state itself.
STATE_WORDS = {"killed": "its driver is gone: run the same command to go on", "waiting": "not started"}

#: Kind of node -> what several of them are called, in tables and (shorter) in figures.
NODE_WORDS = {
    "data": "data preparation",
    "model": "model import",
    "train": "training stages",
    "materialize": "snapshot sets",
    "evaluate": "evaluations",
    "measure": "measurements",
    "questions": "sets of questions",
    "judge": "benchmarks",
    "boundaries": "measured networks",
}
SHORT_NODE_WORDS = {
    "data": "data",
    "model": "model",
    "train": "stages",
    "materialize": "snapshot sets",
    "evaluate": "evaluations",
    "judge": "benchmarks",
    "boundaries": "measured networks",
}


def data_lines(data: DataSummary) -> list[str]:
    """Say what the data came to: a line for every split, and one for the files that were skipped."""
    lines = [f"{name} {_split_words(split, data.unit)}" for name, split in data.splits.items()]
    if data.skipped:
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in data.skipped.items())
        lines.append(f"skipped {sum(data.skipped.values()):,} files that are no images: {found}")
    return lines


def _split_words(split: SplitSummary, unit: str) -> str:
    """Return `240 samples, 16 to 128 tokens (mean 93), 30 cut (the longest: 412 tokens), 18 without a target`."""
    words = [f"{split.samples:,} {unit}"]
    if split.read is not None and split.read != split.samples:
        words[0] += f" from {split.read:,} documents"
    if split.mean is not None:
        words.append(f"{split.shortest:,} to {split.longest:,} tokens (mean {split.mean:,.0f})")
    longest = f" (the longest: {split.longest_read:,} tokens)" if split.longest_read is not None else ""
    words += [f"{count:,} {what}{longest}" for count, what in ((split.cut, "cut"), (split.dropped, "dropped")) if count]
    words += [f"{split.without_targets:,} without a target"] if split.without_targets else []
    words += [f"{split.empty:,} empty"] if split.empty else []
    words += [f"{split.skipped:,} skipped"] if split.skipped else []
    return ", ".join(words)


def of_kind(kind: str) -> RegimeKind:
    """Return the row of a kind of regime. A kind without a row goes by its own name, in the colours of segprop."""
    return REGIMES.get(kind) or replace(REGIMES["segprop"], title=kind, words=kind, has_base=False)


def titles(regimes: Mapping[str, RegimeSummary]) -> dict[str, str]:
    """Return what to call each regime: the kind's own title where the regime is named after a kind."""
    return {name: of_kind(name).title for name in regimes}


def trained_text(item: RegimeSummary | StageSummary) -> str:
    """Return `134.5 M`, and of what takes turns also how much of it at one time: `134.5 M (28.3 M at a time)`."""
    text = count_text(item.trainable_parameters)
    return text if item.trained_at_once is None else f"{text} ({count_text(item.trained_at_once)} at a time)"


def is_baseline(regime: RegimeSummary) -> bool:
    """Tell whether a regime is of a kind that others may be compared with."""
    return of_kind(regime.kind).baseline


def baseline_of(summary: Summary) -> str | None:
    """Return the name of the regime that others are compared with; None where the run has none."""
    if summary.about is not None and summary.about.yardstick in summary.regimes:
        return summary.about.yardstick
    return next((name for name, regime in summary.regimes.items() if is_baseline(regime)), None)


class MemoryBasis:
    """Decide which figure stands for peak memory: the device's where there is one, else growth of the process."""

    def __init__(self, summary: Summary) -> None:
        stages = [stage for regime in summary.regimes.values() for stage in regime.stages]
        self.device = any(stage.peak_device_bytes for stage in stages)
        self.words = "peak device memory" if self.device else "peak host memory above idle"
        base = summary.regimes.get(baseline_of(summary) or "")
        #: Of the finished baseline; None where it has none.
        self.reference = (self.of(base) or None) if base is not None and base.done else None

    def of(self, item: RegimeSummary | StageSummary) -> float | None:
        """Return the peak of a regime or stage in bytes."""
        value = item.peak_device_bytes if self.device else item.host_growth_bytes
        return None if value is None else float(value)

    def share(self, value: float | None) -> float | None:
        """Return `value` as a share of the baseline's peak; None where one of them is not known."""
        return value / self.reference if value is not None and self.reference else None
