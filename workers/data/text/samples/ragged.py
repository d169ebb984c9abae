"""Runs of different lengths inside flat arrays, without a loop over their elements."""

from __future__ import annotations

import numpy as np


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return int64 (n + 1,): where each of n consecutive runs begins, and the end of the last."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def flat_rows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return int64 (sum of lengths,): `starts[0]`, `starts[0] + 1`, … of every run in order."""
    offsets = offsets_of(lengths)
    rows: np.ndarray = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
    return rows
