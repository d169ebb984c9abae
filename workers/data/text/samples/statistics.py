"""What a split's documents and samples are like, before anything is trained on them."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Shares of the samples that are at most this long.
PERCENTILES = (5, 50, 95, 99)


def lengths_of(lengths: np.ndarray) -> dict[str, float | int]:
    """Compute count, min, max, mean and percentiles (`p5` …) of lengths in tokens; of none, only the count."""
    if not len(lengths):
        return {"count": 0}
    # "lower": a length that is really there, and an integer.
    percentiles = np.percentile(lengths, PERCENTILES, method="lower")
    return {
        "count": len(lengths),
        "min": int(lengths.min()),
        "max": int(lengths.max()),
        "mean": float(lengths.mean()),
        **{f"p{share}": int(value) for share, value in zip(PERCENTILES, percentiles, strict=True)},
    }


def split_statistics(
    documents: np.ndarray, lengths: np.ndarray, targets: np.ndarray, counts: dict[str, int]
) -> dict[str, Any]:
    """Describe a split. `documents`: lengths in tokens before anything was cut; `lengths` and `targets`: of the samples
    stored; `counts`: sequences truncated, dropped, empty, and samples left out because nothing in them counts."""
    return {
        "documents": lengths_of(documents),
        "samples": lengths_of(lengths),
        "tokens": int(lengths.sum()),
        "targets": int(targets.sum()),
        **counts,
    }
