"""What a network makes of single classes, beside loss and accuracy."""

from __future__ import annotations

import numpy as np
import torch

from workers.domains.base import Batch, Rows
from workers.domains.images.scorers import ClassScorer
from workers.specs.results import ByClass, EvaluateResult, Where


def batch(targets: torch.Tensor) -> Batch:
    return Batch((targets,), targets, None, Rows(np.arange(len(targets)), targets))


def test_classes_are_counted_as_a_confusion_matrix_says() -> None:
    generator = torch.Generator().manual_seed(0)
    classes, count = 7, 500
    targets = torch.randint(classes - 1, (count,), generator=generator)  # the last one has no samples
    output = torch.randn(count, classes, generator=generator)
    scorer = ClassScorer(torch.device("cpu"), classes)
    for part in torch.arange(count).split(64):
        scorer.add(output[part], batch(targets[part]))
    found = scorer.by_class()
    assert found is not None
    said = output.argmax(dim=1)
    matrix = np.zeros((classes, classes), int)
    for true, taken in zip(targets.tolist(), said.tolist(), strict=True):
        matrix[true, taken] += 1
    assert found.samples == tuple(matrix.sum(axis=1))
    assert found.said == tuple(matrix.sum(axis=0))
    assert found.right == tuple(matrix.diagonal())
    wrong = [(t, s, int(matrix[t, s])) for t in range(classes) for s in range(classes) if t != s and matrix[t, s]]
    assert list(found.confused) == sorted(wrong, key=lambda pair: -pair[2])
    assert scorer.metrics()["accuracy"] == sum(found.right) / count


def test_nothing_is_counted_where_nobody_asks() -> None:
    scorer = ClassScorer(torch.device("cpu"))
    scorer.add(torch.eye(3), batch(torch.arange(3)))
    assert scorer.by_class() is None
    assert scorer.metrics()["accuracy"] == 1.0


def test_results_of_older_programs_are_read() -> None:
    where = Where(host="h", pid=1, device="cpu", threads=1, started=0.0, finished=1.0)
    counts = ByClass(samples=(1, 2), right=(1, 0), said=(3, 0), confused=((1, 0, 2),))
    result = EvaluateResult(by_class=counts, metrics={"loss": 1.0}, rows=3, seconds=1.0, where=where)
    assert EvaluateResult.from_json(result.to_json()) == result
    older = {key: value for key, value in result.to_json().items() if key != "by_class"}
    assert EvaluateResult.from_json(older).by_class is None
    assert "by_class" not in EvaluateResult(metrics={}, rows=3, seconds=1.0, where=where).to_json()
