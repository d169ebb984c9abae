"""What the targets of samples may be: how they are stored, which losses take them, which metrics they are scored by.

Reading them is in `formats.target_values`, the losses are in `workers.domains.images.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.specs.experiment import TargetKind

#: The name of a loss that a user wrote; it takes targets of every kind.
OWN_LOSS = "python"


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One kind of targets. `one`: what a target is, in words; `parts`: what it has several of; `losses`: those that
    take it, beside one of the user's own; `metrics`: what a split is scored by (`workers.domains.metrics`), the one
    that decides first; `sized`: a target has a value for every output of the head."""

    one: str
    parts: str
    losses: tuple[str, ...]
    metrics: tuple[str, ...]
    sized: bool


TARGETS: Mapping[TargetKind, TargetRow] = {
    "classes": TargetRow(
        one="a class, a whole number from 0 (for other targets set training.loss)",
        parts="classes",
        losses=("cross_entropy",),
        metrics=("accuracy", "loss"),
        sized=False,
    ),
    "labels": TargetRow(
        one="an array (labels,) of values from 0 to 1",
        parts="labels",
        losses=("multi_label",),
        metrics=("f1_micro", "f1_macro", "loss"),
        sized=True,
    ),
    "numbers": TargetRow(
        one="a number, or an array (outputs,) of them, none infinite or NaN",
        parts="numbers",
        losses=("mse", "huber"),
        metrics=("r2", "rmse", "mae", "loss"),
        sized=True,
    ),
    "given": TargetRow(
        one="a number or an array of numbers", parts="values", losses=(), metrics=("loss",), sized=False
    ),
}


@dataclass(frozen=True)
class Target:
    """How a data set's targets are stored: `shape` and `dtype` of one, and the first of train as JSON values."""

    kind: TargetKind
    dtype: str
    shape: tuple[int, ...]
    first: Any = None

    @property
    def row(self) -> TargetRow:
        """What holds of all targets of its kind."""
        return TARGETS[self.kind]


#: Targets of data sets that have names for their classes.
CLASSES = Target("classes", "int64", ())


def kind_for(loss: str | None) -> TargetKind:
    """Return the kind of targets that a loss (by its name; None: cross-entropy) asks for where nothing is said."""
    if loss is None:
        return "classes"
    return next((kind for kind, row in TARGETS.items() if loss in row.losses), "given")


def takes(loss: str, kind: TargetKind) -> bool:
    """Tell whether a loss takes targets of a kind."""
    return loss == OWN_LOSS or loss in TARGETS[kind].losses
