"""The metrics that splits are scored by: which of two values is better, and how one is written. Loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MetricRow:
    """`title`: as sentences call it; `short`: as heads of columns do; `higher`: more of it is better; `share`: a share
    of one, written in percent."""

    title: str
    short: str
    higher: bool
    share: bool = False

    @property
    def heading(self) -> str:
        """The title where a sentence begins."""
        return self.title[:1].upper() + self.title[1:]


METRICS: Mapping[str, MetricRow] = {
    "accuracy": MetricRow("accuracy", "acc.", higher=True, share=True),
    # Of all pairs of sample and label, where the score is at least 0 (a probability of 0.5): as scikit-learn's
    # f1_score(average="micro"), and transformers' example of multi-label classification.
    "f1_micro": MetricRow("F1 (micro)", "F1", higher=True, share=True),
    "f1_macro": MetricRow("F1 (macro)", "F1 (macro)", higher=True, share=True),
    # The mean over outputs, as scikit-learn's r2_score.
    "r2": MetricRow("R²", "R²", higher=True),
    "rmse": MetricRow("RMSE", "RMSE", higher=False),
    "mae": MetricRow("MAE", "MAE", higher=False),
    "token_accuracy": MetricRow("token accuracy", "token acc.", higher=True, share=True),
    "perplexity": MetricRow("perplexity", "perplexity", higher=False),
    "loss": MetricRow("loss", "loss", higher=False),
}
#: Metrics that a network may be judged by, the first of them that it has; a language model's loss comes before its
#: accuracy over tokens.
LEADING = ("f1_micro", "r2", "accuracy", "loss")


def leading(metrics: Collection[str]) -> str:
    """Return the metric that decides among those of an evaluation; without any that is known, accuracy."""
    return next((name for name in LEADING if name in metrics), "accuracy")


def gain(metric: str, value: float, before: float) -> float:
    """Return how much better `value` is than `before`; negative where it is worse."""
    return value - before if METRICS[metric].higher else before - value
