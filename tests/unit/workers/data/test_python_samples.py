"""Data sets of a user's function: what identifies them, and what is said of those that cannot be used."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_store.errors import UserError
from workers.data.images.formats import python_samples
from workers.data.images.inspect import inspect, locate
from workers.specs.experiment import ImageSpec

_numbers = itertools.count()
HEAD = """
import numpy as np, torch
class Rows:
    def __init__(self, n, shape=(2,), dtype=np.float32, change=None):
        self.n, self.shape, self.dtype, self.change = n, shape, dtype, change or {}
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i in self.change: return self.change[i]()
        return torch.from_numpy(np.full(self.shape, i, self.dtype)), i % 3
def fails(): raise RuntimeError("gone")
ONE = Rows(1)
def Nine(change): return Rows(9, change=change)
def f4(*values): return np.array(values, np.float32)
"""


def data(folder: Path, source: str, **settings: Any) -> ImageSpec:
    name = f"data_{next(_numbers)}"
    (folder / f"{name}.py").write_text(HEAD + source)
    return ImageSpec(name="python", build=f"{name}:splits", path=str(folder), **settings)


def test_it_is_described_and_read_in_order_with_its_own_validation_split_last(tmp_path: Path) -> None:
    spec = data(tmp_path, "def splits(): return {'train': Rows(300), 'validation': Rows(7), 'test': Rows(5)}")
    outline = inspect(spec)
    assert (outline.train_rows, outline.test_rows, outline.held_out) == (307, 5, 7)
    assert (outline.native, outline.classes, outline.class_names) == ((2,), 3, ("0", "1", "2"))
    found = locate(spec)
    pieces = list(found.format.pieces(found, "train", range(298, 303)))
    assert [label for piece in pieces for label in piece.labels] == [298 % 3, 299 % 3, 0, 1, 2]
    assert [int(item[0]) for piece in pieces for item in piece.items] == [298, 299, 0, 1, 2]


def test_another_value_another_class_or_other_source_is_another_data_set(tmp_path: Path) -> None:
    sources = [
        "def splits(): return {'train': Rows(9), 'test': Rows(5)}",
        "def splits(): return {'train': Nine({4: lambda: (f4(0, 0), 1)}), 'test': Rows(5)}",
        "def splits(): return {'train': Nine({4: lambda: (f4(4, 4), 2)}), 'test': Rows(5)}",
        "def splits(): return {'train': Rows(9), 'test': Rows(5)}  # again",
    ]
    prints = [inspect(data(tmp_path, source)).fingerprint for source in sources]
    assert len(set(prints)) == len(prints)


def test_a_file_that_arguments_name_is_part_of_it_even_where_samples_are_not_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_samples, "WHOLE_BYTES", 8)
    monkeypatch.setattr(python_samples, "SPREAD", 4)
    source = "def splits(file): return {'train': Rows(90), 'test': Rows(5)}"
    (tmp_path / "table.csv").write_text("1")
    spec = data(tmp_path, source, args={"file": "table.csv"}, classes=3)
    before = inspect(spec).fingerprint
    assert inspect(spec).fingerprint == before
    (tmp_path / "table.csv").write_text("22")
    assert inspect(spec).fingerprint != before


def test_names_of_classes_are_taken_from_the_data_set(tmp_path: Path) -> None:
    named = (
        "def splits():\n    rows = Rows(9)\n    rows.classes = [*'abcd']\n    return {'train': rows, 'test': Rows(5)}"
    )
    assert inspect(data(tmp_path, named)).class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("def splits(): return [1]", {}, "returned a list; allowed"),
        ("def splits(): return {'train': Rows(9), 'tests': Rows(1)}", {}, "has no 'test' and has 'tests'"),
        ("def splits(): return {'train': iter([1]), 'test': Rows(1)}", {}, "train has no length"),
        ("def splits(): return {'train': Rows(0), 'test': Rows(1)}", {}, "train has no samples"),
        ("def splits(): return {'train': Rows(9), 'test': Rows(0)}", {}, "test has no samples"),
        (
            "def splits(): return {'train': Nine({5: fails}), 'test': ONE}",
            {},
            "sample 5 of train cannot be read: RuntimeError: gone",
        ),
        (
            "def splits(): return {'train': Nine({5: lambda: (f4(0, 0, 0), 1)}), 'test': ONE}",
            {},
            r"sample 5 of train is float32 \(3,\), the first of train is float32 \(2,\)",
        ),
        ("def splits(): return {'train': Rows(9), 'test': Rows(4, (3,))}", {}, r"sample 0 of test is float32 \(3,\)"),
        ("def splits(): return {'train': Rows(9, dtype=np.int64), 'test': Rows(4)}", {}, "holds int64; allowed"),
        (
            "def splits(): return {'train': Nine({2: lambda: (f4(0, 0), -1)}), 'test': ONE}",
            {},
            "the target of sample 2 of train is -1; allowed: a class",
        ),
        (
            "def splits(): return {'train': Nine({2: lambda: (f4(0, 0), 0.5)}), 'test': ONE}",
            {},
            "the target of sample 2 of train is 0.5",
        ),
        ("def splits(): return {'train': Rows(9), 'test': ONE}", {"classes": 2}, "class 2; allowed: 0 to 1"),
        ("def splits(): return {'train': Rows(9), 'test': ONE}", {"sample": (5,)}, r"data.sample: \[5\], but samples"),
        (
            "def splits(): return {'train': Nine({0: lambda: (f4(*np.random.rand(2)), 0)}), 'test': ONE}",
            {},
            "another one when it is read again",
        ),
        ("def splits(): return {'train': Nine({0: lambda: 3}), 'test': ONE}", {}, "is a int"),
        ("def splits(): raise OSError('no such table')", {}, "splits failed: OSError: no such table"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(tmp_path: Path, source: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect(data(tmp_path, source, **settings))


def test_large_data_need_a_number_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_samples, "WHOLE_BYTES", 8)
    monkeypatch.setattr(python_samples, "SPREAD", 4)
    spec = data(tmp_path, "def splits(): return {'train': Rows(90), 'test': Rows(5)}")
    with pytest.raises(UserError, match=r"data\.classes: none given"):
        inspect(spec)


def test_floats_stay_as_they_are_and_bytes_become_shares() -> None:
    import torch

    from workers.data.images.source import as_they_are

    assert as_they_are(torch.tensor([0, 255], dtype=torch.uint8), np.arange(2), None).tolist() == [0.0, 1.0]
    assert as_they_are(torch.tensor([0.5, -3.0]), np.arange(2), 1).tolist() == [0.5, -3.0]
