"""Which documents belong to train, validation and test: apart before anything is packed, by the seed alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cache_store.errors import ConfigError
from workers.data.splits import permutation
from workers.data.text.formats import data_is_packed
from workers.specs.language import TextSpec


def split_documents(data: TextSpec, seed: int, documents: Mapping[str, int]) -> dict[str, tuple[str, np.ndarray]]:
    """Choose for each split the data's own split its documents come from and their numbers there, sorted int64.

    `documents` counts those of the data's own splits. A split the data has itself is taken as it is; otherwise
    validation is chosen first, then test, and train is the rest: so neither a limit nor the size of test changes
    what validation is. Limits take fewer documents of a split (where documents are packed, fewer samples instead:
    see `prepare`). ConfigError when a split would have no documents.
    """
    own = documents["train"]
    order = permutation(own, seed, "train")
    taken = 0
    result: dict[str, tuple[str, np.ndarray]] = {}
    for split, setting in (("validation", data.validation), ("test", data.test)):
        if documents.get(split):
            result[split] = (split, permutation(documents[split], seed, split))
        else:
            count = _held_out(split, setting, own)
            result[split] = ("train", order[taken : taken + count])
            taken += count
    if taken >= own:
        raise ConfigError(
            f"data.validation, data.test: {data.validation} and {data.test} of {own} documents leave none to train on; "
            f"allowed: shares below 1 or counts that hold out at most {own - 1} together"
        )
    result["train"] = ("train", order[taken:])
    limits = {"train": data.train_limit, "validation": data.validation_limit, "test": data.test_limit}
    if data_is_packed(data):
        limits = dict.fromkeys(limits)
    return {split: (result[split][0], np.sort(result[split][1][: limits[split]])) for split in limits}


def _held_out(split: str, setting: float, documents: int) -> int:
    count = round(setting * documents) if setting < 1 else int(setting)
    if setting >= 1 and count != setting:
        raise ConfigError(f"data.{split}: {setting} is no whole number of documents; allowed: a share below 1")
    if not 0 < count < documents:
        left = f"none for {split}" if count == 0 else "none to train on"
        raise ConfigError(
            f"data.{split}: {setting} of {documents} documents leaves {left}; allowed: a share below 1 or a count that "
            f"holds out 1 to {documents - 1} documents. A plain text file is one document; a row of JSON lines is one"
        )
    return count
