"""Standard errors of what is measured on samples."""

from __future__ import annotations

import math
from collections.abc import Sequence


def error_of_mean(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; 0 of a single one."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def jackknife_error(without: Sequence[float]) -> float:
    """Return the standard error of a figure by the delete-a-group jackknife. `without`: the figure of all samples but
    those of one group, of every group; groups are equally large."""
    count = len(without)
    mean = sum(without) / max(count, 1)
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without)) if count > 1 else 0.0


def error_of_share(share: float, count: int) -> float:
    """Return the standard error of a share of `count` independent trials."""
    return math.sqrt(share * (1 - share) / count)
