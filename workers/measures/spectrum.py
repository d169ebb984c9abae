"""Effective rank (Roy and Vetterli, 2007) of a representation: exp of the entropy of its singular values, normalized to
sum 1; of the samples less their mean. It is the rank for equal singular values, and 1 where one direction holds all."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(singular: Tensor) -> float:
    """Return the effective rank of singular values; 0 where all are 0."""
    total = float(singular.sum())
    if total <= 0:
        return 0.0
    shares = singular / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def singular_values(samples: Tensor) -> Tensor:
    """Return the singular values of samples (n, d) less their mean, n or d of them, in ascending order."""
    wide = samples.double()
    centred = wide - wide.mean(dim=0)
    return _roots(centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred)


def singular_values_without(samples: Tensor, groups: int) -> list[Tensor]:
    """Return the singular values of the samples but for one group, for each of so many groups of about equal size."""
    parts = torch.tensor_split(samples, groups)
    if len(samples) < samples.shape[1]:
        return [singular_values(torch.cat([*parts[:index], *parts[index + 1 :]])) for index in range(groups)]
    # Sums over groups: every sample is looked at once.
    wide = [part.double() for part in parts]
    sums, squares = torch.stack([part.sum(dim=0) for part in wide]), torch.stack([part.T @ part for part in wide])
    total, scatter = sums.sum(dim=0), squares.sum(dim=0)
    found = []
    for part, own, square in zip(parts, sums, squares, strict=True):
        left = total - own
        found.append(_roots(scatter - square - torch.outer(left, left) / (len(samples) - len(part))))
    return found


def _roots(gram: Tensor) -> Tensor:
    """Return the square roots of the eigenvalues; 0 for those below the rounding of the largest, which say nothing."""
    found: Tensor = torch.linalg.eigvalsh(gram)
    floor = float(found[-1].clamp_min(0)) * len(found) * torch.finfo(found.dtype).eps
    return torch.where(found > floor, found, torch.zeros_like(found)).sqrt()
