"""Decide what regimes are judged by: the figure that leads, whether more of it is better, how it is written.

Classifiers are read by accuracy, networks of other targets by F1, R² or their loss; language models by the loss on
held-out text (perplexity is the same figure, written otherwise); language models on questions with candidates by the
share that is answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from orchestrator.reports.records import Metrics, StageSummary, Summary
from orchestrator.reports.words import baseline_of
from orchestrator.units import DASH, metric_text
from workers.domains.metrics import METRICS, MetricRow, gain, leading


@dataclass(frozen=True)
class Quality:
    """`metric` leads and is a key of the metrics; `text`: the regimes train a language model; `task`: on questions."""

    metric: str
    text: bool
    task: bool

    def value(self, metrics: Metrics) -> float | None:
        """Return the leading figure."""
        found = metrics.get(self.metric)
        return None if found is None else float(found)

    def written(self, value: float | None) -> str:
        return metric_text(self.metric, value)

    @property
    def row(self) -> MetricRow:
        """What the metric is called, and which of two values is better."""
        return METRICS[self.metric]

    @property
    def perplexed(self) -> bool:
        """Whether perplexity stands beside the metric."""
        return self.text and self.metric == "loss"

    def gain(self, value: float, before: float) -> float:
        """Return how much better `value` is than `before`; negative where it is worse."""
        return gain(self.metric, value, before)

    def ranked(self, values: Mapping[str, float]) -> list[str]:
        """Return the names, the best first; equals in their own order."""
        return sorted(values, key=lambda name: -self.gain(values[name], 0.0))

    def best(self, values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return max(known, key=lambda value: self.gain(value, 0.0), default=None)


@dataclass(frozen=True)
class Improvement:
    """Over the untouched model, on the test split. `share`: of the first end-to-end regime's improvement; None for that
    regime itself, and where there is none or it did not improve."""

    gain: float
    share: float | None


def quality_of(summary: Summary) -> Quality:
    """Decide what regimes are judged by, also in a run that has hardly begun: any figure may say that it is of text."""
    metrics = [found for found in _metrics(summary) if found]
    task = any("token_accuracy" in found for found in metrics)
    # Before anything is scored, a network that is cut at its layers is most likely one of text.
    layered = not metrics and any(stage.layer is not None for stage in _stages(summary))
    text = task or layered or any("perplexity" in found for found in metrics)
    if text:
        return Quality("accuracy" if task else "loss", text, task)
    return Quality(leading({name for found in metrics for name in found}), text, task)


def original_of(summary: Summary, split: str = "test") -> Metrics:
    """Return the metrics of the model as it came; {} where it came without weights or is not judged yet."""
    return summary.original.get(split, {})


def improvements(summary: Summary, quality: Quality) -> dict[str, Improvement]:
    """Return how much each regime with a test result improved; {} without a judged original."""
    before = quality.value(original_of(summary))
    if before is None:
        return {}
    gains = {
        name: quality.gain(value, before)
        for name, regime in summary.regimes.items()
        if (value := quality.value(regime.final.metrics)) is not None
    }
    base = baseline_of(summary)
    whole = gains.get(base, 0.0) if base is not None else 0.0
    return {
        name: Improvement(gain, gain / whole if name != base and whole > 0 else None) for name, gain in gains.items()
    }


def loss_text(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def perplexity_text(metrics: Metrics) -> str:
    """Two decimals while they say something: 8.19, 134, 2.1e+06."""
    value = metrics.get("perplexity")
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 100_000 else f"{value:.1e}"


def _stages(summary: Summary) -> Iterator[StageSummary]:
    for regime in summary.regimes.values():
        yield from regime.stages


def _metrics(summary: Summary) -> Iterator[Metrics]:
    yield from summary.original.values()
    for regime in summary.regimes.values():
        yield regime.final.metrics
        yield regime.final.validation
    for stage in _stages(summary):
        yield stage.assembled
        yield from (epoch.validation or {} for epoch in stage.curve)
