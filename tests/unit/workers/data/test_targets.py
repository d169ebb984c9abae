"""Targets that are no classes: how they are stored, what identifies them, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_python_samples import data

from cache_store.errors import UserError
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data.images.inspect import inspect
from workers.data.images.prepare import prepare
from workers.data.images.source import ImageSource
from workers.data.images.targets import kind_for, takes
from workers.specs.experiment import Experiment, ImageSpec, PythonSpec

SPLITS = "\ndef splits(): return {{'train': Of({train}), 'test': Of({test})}}"
HEAD = """
class Of(Rows):
    def __init__(self, targets):
        super().__init__(len(targets)); self.targets = targets
    def __getitem__(self, i): return torch.full((2,), float(i)), self.targets[i]
"""


def of(folder: Path, train: str, test: str, **settings: Any) -> ImageSpec:
    """A data set with these targets, as Python writes them."""
    return data(folder, HEAD + SPLITS.format(train=train, test=test), **settings)


@pytest.mark.parametrize(
    ("kind", "targets", "shape", "dtype", "outputs"),
    [
        ("labels", "np.eye(9, 4, dtype=np.int64)", (4,), "float32", 4),
        ("labels", "[[True, False]] * 9", (2,), "float32", 2),
        ("numbers", "[0.5 * i for i in range(9)]", (1,), "float32", 1),
        ("numbers", "torch.arange(18).view(9, 2)", (2,), "float32", 2),
        ("given", "[0.5] * 9", (), "float32", 3),
        ("given", "list(range(9))", (), "int64", 3),
        ("given", "torch.zeros(9, 2, 5)", (2, 5), "float32", 3),
    ],
)
def test_they_are_stored_and_read_in_one_type_and_shape(
    tmp_path: Path, kind: Any, targets: str, shape: tuple[int, ...], dtype: str, outputs: int
) -> None:
    spec = of(tmp_path, targets, targets, targets=kind, classes=3 if kind == "given" else None, validation=2)
    outline = inspect(spec)
    assert (outline.target.kind, outline.target.shape, outline.target.dtype) == (kind, shape, dtype)
    assert outline.classes == outputs
    snapshots = SnapshotStore(open_storage(str(tmp_path / "store")))
    prepared = prepare(spec, snapshots)
    experiment = Experiment(model=PythonSpec(build="a:b"), data=spec, classes=outputs, seed=0)
    source = ImageSource(experiment, prepared, snapshots, "test")
    assert source.labels.shape == (9, *shape)
    assert str(source.labels.dtype) == f"torch.{dtype}"
    # Another reading of the same text.
    expected = torch.tensor(np.asarray(eval(targets, {"np": np, "torch": torch})))
    assert torch.equal(source.labels, expected.to(source.labels.dtype).view(9, *shape))


def test_the_same_numbers_as_another_kind_are_another_data_set(tmp_path: Path) -> None:
    spec = of(tmp_path, "[[0.0, 1.0]] * 3", "[[0.0, 1.0]] * 3", targets="labels")
    other = ImageSpec(**{**vars(spec), "targets": "numbers"})
    changed = of(tmp_path, "[[0.0, 1.0]] * 2 + [[0.0, 0.5]]", "[[0.0, 1.0]] * 3", targets="labels")
    assert len({inspect(each).fingerprint for each in (spec, other, changed)}) == 3


@pytest.mark.parametrize(
    ("kind", "targets", "settings", "message"),
    [
        (None, "[0.5] * 9", {}, "the target of sample 0 of train is 0.5; allowed: a class, .* set training.loss"),
        ("labels", "[3] * 9", {}, "sample 0 of train is 3; allowed: an array"),
        ("labels", "[[0, 1]] * 8 + [[0, 2]]", {}, r"sample 8 of train is an array of int64 \(2,\) with the value 2"),
        ("labels", "[[0, float('nan')]] * 9", {}, "with the value nan"),
        ("labels", "[[0, 1]] * 8 + [[0, 1, 1]]", {}, r"sample 8 of train is float32 \(3,\), that of the first .*alike"),
        ("labels", "[[0, 1]] * 9", {"classes": 3}, "data.classes: 3, but a target has 2 labels"),
        ("labels", "['cat'] * 9", {}, "sample 0 of train is 'cat'"),
        ("numbers", "[1.0] * 7 + [float('inf')] * 2", {}, "sample 7 of train is inf; allowed: a number"),
        ("numbers", "[1e300] * 9", {}, "sample 0 of train is 1e\\+300"),
        ("numbers", "[[0.0, float('nan')]] * 9", {}, "with the value nan"),
        ("numbers", "[[[0.0]]] * 9", {}, r"is an array of float64 \(1, 1\)"),
        ("numbers", "[None] * 9", {}, "sample 0 of train is None"),
        ("numbers", "[[1.0, 2.0]] * 9", {"classes": 1}, "data.classes: 1, but a target has 2 numbers"),
        ("given", "[1.0] * 9", {}, "data.classes: none given"),
        ("given", "[1.0] * 8 + [1]", {"classes": 1}, r"sample 8 of train is int64 \(\), that of the first"),
        ("given", "[{}] * 9", {"classes": 1}, "is {}; allowed: a number or an array"),
    ],
)
def test_those_that_do_not_fit_are_named(
    tmp_path: Path, kind: Any, targets: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        inspect(of(tmp_path, targets, targets, targets=kind, **settings))


def test_losses_ask_for_targets_of_their_kind() -> None:
    losses = (None, "cross_entropy", "multi_label", "mse", "huber", "python")
    assert [kind_for(loss) for loss in losses] == ["classes", "classes", "labels", "numbers", "numbers", "given"]
    assert takes("python", "classes")
    assert not takes("mse", "labels")
