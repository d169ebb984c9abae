"""Which rows of the prepared sets belong to train, validation and test: a function of the seed alone."""

from __future__ import annotations

import numpy as np

from cache_store.errors import ConfigError
from workers.seeds import derive_seed
from workers.specs.experiment import ImageSpec


def rows(data: ImageSpec, seed: int, train_rows: int, test_rows: int) -> dict[str, np.ndarray]:
    """Choose the rows of each split: `train` and `validation` (disjoint) of the train set, `test` of the test set.

    Each is a sorted int64 array. The validation rows are chosen first, by `seed`; `train_limit` then takes
    from the rest, so a limit never changes what validation is. A limit above what there is means all of it.
    Raises ConfigError when `validation` leaves no sample to train or to validate on.
    """
    order = permutation(train_rows, seed, "train")
    held_out = _validation_rows(data.validation, train_rows)
    validation, train = order[:held_out], order[held_out:]
    return {
        "train": np.sort(train[: data.train_limit]),
        "validation": np.sort(validation),
        "test": np.sort(permutation(test_rows, seed, "test")[: data.test_limit]),
    }


def _validation_rows(validation: float, train_rows: int) -> int:
    count = round(validation * train_rows) if validation < 1 else int(validation)
    if validation >= 1 and count != validation:
        raise ConfigError(f"data.validation: {validation} is no whole number of samples; allowed: a share below 1")
    if not 0 < count < train_rows:
        left = "validate" if count == 0 else "train"
        raise ConfigError(
            f"data.validation: {validation} of {train_rows} training samples leaves none to {left} on; "
            f"allowed: a share below 1 or a count that holds out 1 to {train_rows - 1} samples"
        )
    return count


def permutation(count: int, seed: int, name: str) -> np.ndarray:
    """Put the numbers 0 .. count - 1 in an order that is a function of (count, seed, name) alone, int64."""
    # Sorting a bit generator's raw stream: numpy keeps that stable across versions, unlike `permutation`.
    keys = np.random.Philox(key=derive_seed(seed, "split", name)).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)
