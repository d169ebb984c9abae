"""Data sets that a user's own function returns: (tensor or array, target) by index, taken as they are.

What identifies them is the function's source, its arguments and their content: of all samples where they come to
64 MiB or less, else of 256 of every split. Files that arguments name count by size and time of change, too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_store.errors import ConfigError, DataError
from cache_store.keys import canonical_json, digest_json
from workers import user_code
from workers.data.files import SourceFile
from workers.data.images.facts import ImageFacts, Split
from workers.data.images.formats.base import DataFormat, FileFormat, ImageFiles, ImagePiece, overlaps
from workers.data.images.formats.target_values import TargetValue, read_target, target_bytes
from workers.data.images.targets import CLASSES, TARGETS, Target
from workers.specs.experiment import ImageSpec, TargetKind

_WHERE = "data.build"
#: Data sets up to this are read whole to identify them; of larger ones this many samples of every split.
WHOLE_BYTES, SPREAD = 64 << 20, 256
#: Samples that are read at a time.
_PIECE = 256
_SPLITS = ("train", "validation", "test")
_FORM = 'allowed: {"train": …, "test": …}, and "validation" where there is one'


@dataclass(frozen=True)
class Samples:
    """One split: what a user's data set gives, checked as it is read."""

    name: str
    dataset: Any
    rows: int
    shape: tuple[int, ...]
    dtype: str
    target: Target = CLASSES

    def read(self, index: int) -> tuple[np.ndarray, TargetValue]:
        """One sample. DataError naming it when the data set fails, or gives another kind of sample than the first."""
        sample, label = read_sample(self.name, self.dataset, index, self.target.kind)
        if sample.shape != self.shape or str(sample.dtype) != self.dtype:
            raise _refuse(
                f"sample {index} of {self.name} is {sample.dtype} {sample.shape}, the first of train is {self.dtype} "
                f"{self.shape}: all must be alike"
            )
        found = _target_of(self.target.kind, label)
        if (found.dtype, found.shape) != (self.target.dtype, self.target.shape):
            raise _refuse(
                f"the target of sample {index} of {self.name} is {found.dtype} {found.shape}, that of the first of "
                f"train is {self.target.dtype} {self.target.shape}: all must be alike"
            )
        return sample, label


@dataclass(frozen=True)
class SampleFiles(ImageFiles):
    """The samples of both splits; the last `held_out` of train are the validation split."""

    samples: Mapping[Split, tuple[Samples, ...]] = None  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.samples["train"][0].shape

    @property
    def dtype(self) -> str:
        return self.samples["train"][0].dtype

    @property
    def target(self) -> Target:
        return self.samples["train"][0].target


class PythonSamples(DataFormat, FileFormat):
    """See the module."""

    name = "python"
    # One piece is one task, so that a data set is asked by one thread at a time.
    piece_rows = _PIECE
    facts = ImageFacts(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), side=1)
    allowed = "data.build, a function that returns the data sets"
    as_they_are = True

    def locate(self, data: ImageSpec) -> SampleFiles:
        """See `DataFormat`. Reads the samples that identify the data set."""
        if data.build is None:
            raise ConfigError(f"{_WHERE}: none given for python; allowed: module:function", where=_WHERE)
        return _located(data, user_code.find(data.build, data.path, _WHERE))

    def pieces(self, source: ImageFiles, split: Split, rows: range) -> Iterator[ImagePiece]:
        """See `FileFormat`."""
        if not isinstance(source, SampleFiles):
            raise TypeError("samples of Python come with their data sets")
        for start, stop, index in overlaps(source.lengths(split), rows):
            samples = source.samples[split][index]
            for first in range(start, stop, _PIECE):
                read = [samples.read(row) for row in range(first, min(first + _PIECE, stop))]
                yield ImagePiece(samples.name, first, [sample for sample, _ in read], [label for _, label in read])

    def image(self, source: ImageFiles, item: np.ndarray, side: int) -> np.ndarray:
        """See `FileFormat`: a sample is what it is."""
        return item


def _located(data: ImageSpec, code: user_code.UserCode) -> SampleFiles:
    splits = _splits(user_code.call(code, data.args, _WHERE))
    lengths = {name: _length(name, dataset) for name, dataset in splits.items()}
    kind = data.targets or "classes"
    first, label = read_sample("train", splits["train"], 0, kind)
    _check_first(first, data, splits["train"])
    target = _target_of(kind, label)
    checked = {
        name: Samples(name, dataset, lengths[name], first.shape, str(first.dtype), target)
        for name, dataset in splits.items()
    }
    scanned = {name: _scan(samples) for name, samples in checked.items()}
    names = _classes(data, splits["train"], scanned) if target == CLASSES else _outputs(data, splits["train"], target)
    identity = digest_json([code.digest, data.build, data.args, _files_named(data, code)])
    files: dict[str, SourceFile] = {
        name: SourceFile(
            path=f"{data.build} [{name}]", name=name, size=samples.rows, stamp=f"{identity} {scanned[name].digest}",
            rows=samples.rows,
        )
        for name, samples in checked.items()
    }  # fmt: skip
    train = tuple(name for name in ("train", "validation") if name in checked)
    return SampleFiles(
        PYTHON_SAMPLES,
        f"{data.build}",
        None,
        {"train": tuple(files[name] for name in train), "test": (files["test"],)},
        names,
        held_out=checked["validation"].rows if "validation" in checked else 0,
        samples={"train": tuple(checked[name] for name in train), "test": (checked["test"],)},
    )


def _splits(found: Any) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise _refuse(f"returned a {type(found).__name__}; {_FORM}")
    missing = [name for name in ("train", "test") if name not in found]
    unknown = sorted(str(name) for name in found if name not in _SPLITS)
    if missing or unknown:
        words = [*(f"has no {name!r}" for name in missing), *(f"has {name!r}" for name in unknown)]
        raise _refuse(f"returned a mapping that {' and '.join(words)}; {_FORM}")
    return {name: found[name] for name in _SPLITS if name in found}


def _length(name: str, dataset: Any) -> int:
    try:
        rows = len(dataset)
    except Exception as error:  # whatever it raises is the user's own
        raise _refuse(f"{name} has no length ({user_code.words_of(error)}); allowed: data sets with len()") from error
    if rows < 1:
        raise _refuse(f"{name} has no samples")
    return rows


def read_sample(name: str, dataset: Any, index: int, kind: TargetKind) -> tuple[np.ndarray, TargetValue]:
    """One sample as an array and its target. DataError naming it when there is none, or it is something else."""
    try:
        given = dataset[index]
    except Exception as error:  # whatever it raises is the user's own
        raise _refuse(f"sample {index} of {name} cannot be read: {user_code.words_of(error)}") from error
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise _refuse(f"sample {index} of {name} is a {type(given).__name__}; allowed: (tensor or array, target)")
    sample, label = given
    if not (hasattr(sample, "__array__") and hasattr(sample, "shape")):
        raise _refuse(f"sample {index} of {name} holds a {type(sample).__name__}; allowed: a tensor or an array")
    array = np.ascontiguousarray(np.asarray(sample))
    if array.dtype not in (np.uint8, np.float32):
        raise _refuse(f"sample {index} of {name} holds {array.dtype}; allowed: float32, or uint8 of 0 to 255")
    try:
        return array, read_target(kind, label)
    except ValueError as error:
        raise _refuse(f"the target of sample {index} of {name} is {error}; allowed: {TARGETS[kind].one}") from error


def _target_of(kind: TargetKind, label: TargetValue) -> Target:
    """Describe how a target is stored."""
    if isinstance(label, int):
        return CLASSES
    return Target(kind, str(label.dtype), label.shape, label.tolist())


def _check_first(first: np.ndarray, data: ImageSpec, dataset: Any) -> None:
    if first.ndim < 1 or 0 in first.shape:
        raise _refuse(f"samples have the shape {first.shape}; allowed: one dimension or more, none of them 0")
    if data.sample is not None and data.sample != first.shape:
        raise DataError(f"data.sample: {list(data.sample)}, but samples have the shape {list(first.shape)}")
    again, _ = read_sample("train", dataset, 0, data.targets or "classes")
    if again.shape != first.shape or again.tobytes() != first.tobytes():
        raise _refuse(
            "sample 0 of train is another one when it is read again: samples are stored once, so they may not be drawn "
            "at random; leave augmentation out"
        )


@dataclass(frozen=True)
class _Scan:
    digest: str
    largest: int
    whole: bool


def _scan(samples: Samples) -> _Scan:
    """Read what identifies a split: all of it, or samples that are spread over it."""
    size = int(np.prod(samples.shape)) * np.dtype(samples.dtype).itemsize
    whole = samples.rows * size <= WHOLE_BYTES or samples.rows <= SPREAD
    rows = range(samples.rows) if whole else np.linspace(0, samples.rows - 1, SPREAD).astype(int).tolist()
    target = samples.target
    of_target = [] if target == CLASSES else [target.kind, target.dtype, target.shape]
    total, largest = hashlib.sha256(canonical_json([samples.rows, samples.dtype, samples.shape, *of_target])), 0
    for row in rows:
        sample, label = samples.read(row)
        largest = max(largest, label) if isinstance(label, int) else largest
        total.update(sample.data.cast("B"))
        total.update(target_bytes(label))
    return _Scan(total.hexdigest(), largest, whole)


def _classes(data: ImageSpec, dataset: Any, scanned: Mapping[str, _Scan]) -> tuple[str, ...]:
    """Names of the classes. DataError when a target lies outside them, or their number is unknown."""
    own = getattr(dataset, "classes", None)
    named = isinstance(own, list | tuple) and all(isinstance(name, str) for name in own)
    largest = max(scan.largest for scan in scanned.values())
    if data.classes is None and not named and not all(scan.whole for scan in scanned.values()):
        raise DataError(
            "data.classes: none given, and the data are too large to look at every target; give their number, or give "
            "the training set an attribute `classes`, a list of their names"
        )
    count = data.classes or (len(own) if named and own is not None else largest + 1)
    if largest >= count:
        name = next(name for name, scan in scanned.items() if scan.largest == largest)
        raise DataError(f"data.classes: {name} has the class {largest}; allowed: 0 to {count - 1}")
    return tuple(own) if named and own is not None and len(own) == count else tuple(map(str, range(count)))


def _outputs(data: ImageSpec, dataset: Any, target: Target) -> tuple[str, ...]:
    """Names of the outputs that the head has for targets that are no classes. DataError when their number is unknown,
    or another one than a target has."""
    if not target.row.sized:
        if data.classes is None:
            raise DataError(
                "data.classes: none given; targets are taken as they are, so say how many outputs the head has for them"
            )
        count = data.classes
    else:
        (count,) = target.shape
        if data.classes not in (None, count):
            raise DataError(f"data.classes: {data.classes}, but a target has {count} {target.row.parts}")
    own = getattr(dataset, "classes", None)
    named = isinstance(own, list | tuple) and all(isinstance(name, str) for name in own) and len(own) == count
    return tuple(own) if named and own is not None else tuple(map(str, range(count)))


def _files_named(data: ImageSpec, code: user_code.UserCode) -> list[list[Any]]:
    """Size and time of change of what arguments name, looked for here and beside the code; of folders their files."""
    found: list[list[Any]] = []
    for value in (data.args or {}).values():
        if not isinstance(value, str):
            continue
        for base in (Path(), code.root):
            path = base / Path(value).expanduser()
            if path.exists():
                files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
                found += [[os.path.relpath(file, path), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
                break
    return found


def _refuse(message: str) -> DataError:
    return DataError(f"{_WHERE}: {message}")


PYTHON_SAMPLES = PythonSamples()
