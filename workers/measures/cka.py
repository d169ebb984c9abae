"""Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414), debiased, over blocks of samples (Nguyen et
al., arXiv 2010.15327): the sums over blocks of the unbiased HSIC of Song et al. (2012), normalized once.

    CKA(X, Z) = Σ HSIC₁(X, Z) / √(Σ HSIC₁(X, X) · Σ HSIC₁(Z, Z))

1 for representations that are equal up to rotation and scale, 0 in expectation for independent ones, where it may come
out negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def unbiased_hsic(one: Tensor, other: Tensor) -> float:
    """Return HSIC₁ of two kernel matrices (m, m) of the same samples, m at least 4."""
    size = len(one)
    first, second = (matrix - torch.diag(matrix.diagonal()) for matrix in (one, other))
    rows = first.sum(dim=0) @ second.sum(dim=0)
    total = (first * second).sum() + first.sum() * second.sum() / ((size - 1) * (size - 2)) - 2 * rows / (size - 2)
    return float(total) / (size * (size - 3))


@dataclass(frozen=True)
class Aligned:
    """The three criteria of a block."""

    both: float
    one: float
    other: float


def aligned(one: Tensor, other: Tensor) -> Aligned:
    """Compare two representations (m, d) and (m, e) of a block of samples, in double precision."""
    first, second = (_linear_gram(samples.double()) for samples in (one, other))
    return Aligned(unbiased_hsic(first, second), unbiased_hsic(first, first), unbiased_hsic(second, second))


def cka(blocks: Sequence[Aligned]) -> float:
    """Return the alignment over blocks. NaN where a representation is constant."""
    scale = sum(block.one for block in blocks) * sum(block.other for block in blocks)
    return sum(block.both for block in blocks) / math.sqrt(scale) if scale > 0 else math.nan


def _linear_gram(samples: Tensor) -> Tensor:
    # What is estimated does not depend on the mean; its rounding does.
    centred = samples - samples.mean(dim=0)
    return centred @ centred.T
