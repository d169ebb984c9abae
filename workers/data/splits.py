"""Which rows of the prepared sets belong to train, validation and test: a function of the seed alone."""

from __future__ import annotations

from typing import Literal

import numpy as np

from cache_store.errors import ConfigError
from workers.seeds import derive_seed
from workers.specs.experiment import ImageSpec


def rows(data: ImageSpec, seed: int, train_rows: int, test_rows: int, held_out: int = 0) -> dict[str, np.ndarray]:
    """Choose the rows of each split: `train` and `validation` (disjoint) of the train set, `test` of the test set.

    Where `test_rows` is 0, `data.test` of the train set is the test split, chosen before the others. The last
    `held_out` rows of the train set are the validation split; where that is 0, `data.validation` of it is. Each is a
    sorted int64 array. The validation rows are chosen by `seed`, before those to train on; `train_limit` then takes
    from the rest, so a limit never changes what validation is. A limit above what there is means all of it.
    Raises ConfigError when `validation` or `test` leaves no sample to train, to validate or to test on.
    """
    own = np.arange(train_rows - held_out)
    if test_rows:
        test = permutation(test_rows, seed, "test")
    else:
        order = permutation(len(own), seed, "test")
        count = _held_out("test", data.test, len(own))
        test, own = order[:count], np.sort(order[count:])
    order = own[permutation(len(own), seed, "train")]
    if held_out:
        validation, train = np.arange(train_rows - held_out, train_rows), order
    else:
        count = _held_out("validation", data.validation, len(own))
        validation, train = order[:count], order[count:]
    return {
        "train": np.sort(train[: data.train_limit]),
        "validation": np.sort(validation),
        "test": np.sort(test[: data.test_limit]),
    }


def _held_out(setting: Literal["validation", "test"], value: float, rows: int) -> int:
    count = round(value * rows) if value < 1 else int(value)
    if value >= 1 and count != value:
        raise ConfigError(f"data.{setting}: {value} is no whole number of samples; allowed: a share below 1")
    if not 0 < count < rows:
        left = {"validation": "validate", "test": "test"}[setting] if count == 0 else "train"
        raise ConfigError(
            f"data.{setting}: {value} of {rows} training samples leaves none to {left} on; "
            f"allowed: a share below 1 or a count that holds out 1 to {rows - 1} samples"
        )
    return count


def permutation(count: int, seed: int, name: str) -> np.ndarray:
    """Put the numbers 0 .. count - 1 in an order that is a function of (count, seed, name) alone, int64."""
    # Sorting a bit generator's raw stream: numpy keeps that stable across versions, unlike `permutation`.
    keys = np.random.Philox(key=derive_seed(seed, "split", name)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)
