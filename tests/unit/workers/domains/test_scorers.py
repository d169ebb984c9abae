"""Scores of targets that are no classes, beside scikit-learn's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch.nn import functional as F

from workers.data.images.source import ImageSource
from workers.domains.base import Batch, Rows
from workers.domains.images.scorers import SCORERS, LabelScorer, LossScorer, NumberScorer
from workers.domains.metrics import METRICS, gain, leading

ROWS = 300


def batch(targets: torch.Tensor) -> Batch:
    return Batch((targets,), targets, None, Rows(np.arange(len(targets)), targets))


def scored(kind: Any, output: torch.Tensor, targets: torch.Tensor, loss: Any) -> dict[str, float]:
    """Scores of the split by two ranks, each of which has a part of it."""
    source = cast("ImageSource", SimpleNamespace(labels=targets, classes=targets.shape[1]))
    first, second = (SCORERS[kind](source, torch.device("cpu"), loss) for _ in range(2))
    for index, part in enumerate(torch.arange(len(targets)).split(64)):
        (first, second)[index % 2].add(output[part], batch(targets[part]))
    first.sums += second.sums
    return first.metrics()


def drawn(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_f1_and_loss_of_labels_are_those_of_scikit_learn_and_torch() -> None:
    output, targets = drawn(0, (ROWS, 5)), (drawn(1, (ROWS, 5)) > 0.3).float()
    output[:, 4], targets[:, 4] = -1, 0  # a label that is neither there nor said
    found = scored("labels", output, targets, F.binary_cross_entropy_with_logits)
    said, true = (output >= 0).numpy(), targets.bool().numpy()
    for average in ("micro", "macro"):
        expected = sklearn_metrics.f1_score(true, said, average=average, zero_division=0.0)
        assert found[f"f1_{average}"] == pytest.approx(expected, abs=1e-12)
    assert found["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(output, targets).item(), rel=1e-6)
    assert tuple(found) == ("f1_micro", "f1_macro", "loss")
    none = torch.zeros(4, 2)
    assert scored("labels", none - 1, none, F.binary_cross_entropy_with_logits)["f1_micro"] == 0.0


def test_scores_of_numbers_are_those_of_scikit_learn_also_far_from_zero() -> None:
    targets = drawn(2, (ROWS, 3)) * torch.tensor([1.0, 0.01, 100.0]) + torch.tensor([0.0, 50.0, 3e4])
    output = targets + 0.1 * drawn(3, (ROWS, 3))
    found = scored("numbers", output, targets, F.mse_loss)
    true, said = targets.double().numpy(), output.double().numpy()
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(true, said), rel=1e-9)
    assert found["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(true, said), rel=1e-9)
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(true, said), rel=1e-9)
    assert found["loss"] == pytest.approx(F.mse_loss(output, targets).item(), rel=1e-5)


def test_r2_of_targets_that_are_all_the_same_is_one_where_they_are_met_else_nothing() -> None:
    same = torch.full((8, 1), 3.0)
    for off, expected in ((0.0, 1.0), (0.5, 0.0)):
        found = scored("numbers", same + off, same, F.mse_loss)["r2"]
        assert found == expected == sklearn_metrics.r2_score(same.numpy(), (same + off).numpy())


def test_targets_that_are_taken_as_they_are_have_a_loss_alone() -> None:
    output, targets = drawn(4, (ROWS, 2)), drawn(5, (ROWS, 4))
    found = scored("given", output, targets, lambda out, given: out.sum(1).mean() + given.sum(1).mean())
    assert found == {"loss": pytest.approx((output.sum(1) + targets.sum(1)).mean().item(), abs=1e-5)}


def test_no_single_class_is_counted_of_them() -> None:
    source = cast("ImageSource", SimpleNamespace(labels=torch.zeros(1, 2), classes=2))
    scorers: list[LossScorer] = [
        kind(source, torch.device("cpu"), F.mse_loss) for kind in (LossScorer, LabelScorer, NumberScorer)
    ]
    assert [scorer.by_class() for scorer in scorers] == [None] * 3


def test_which_metric_leads_and_which_of_two_values_is_better() -> None:
    assert leading(("loss", "accuracy")) == leading(()) == "accuracy"
    assert leading(("rmse", "mae", "r2", "loss")) == "r2"
    assert leading(("f1_macro", "loss", "f1_micro")) == "f1_micro"
    assert leading(("loss",)) == "loss"
    assert gain("r2", 0.5, -0.5) == gain("rmse", 1.0, 2.0) == 1.0
    assert {name for name, row in METRICS.items() if not row.higher} == {"rmse", "mae", "loss", "perplexity"}
