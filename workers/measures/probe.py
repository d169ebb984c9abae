"""Linear probes: how much of the classes a linear map of a representation tells, on samples it was not fitted to.

Ridge regression onto one-hot classes, solved exactly: no steps, no rate, one answer. Features are scaled to variance 1
on the samples fitted to, and the penalty is `RIDGE` of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Of a feature's variance.
RIDGE = 1e-3


def probe_accuracy(fitted: Tensor, classes: Tensor, held_out: Tensor, true: Tensor) -> float:
    """Fit to `fitted` (n, d) and its one-hot `classes` (n, c); return the share of `held_out` (k, d) that is told right
    of `true` int64 (k,)."""
    samples, targets = fitted.double(), classes.double()
    mean, scale = samples.mean(dim=0), samples.std(dim=0, correction=0)
    # A constant feature tells nothing.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    wide = (samples - mean) / scale
    weights = ridge(wide, targets - targets.mean(dim=0), RIDGE * len(wide))
    said = ((held_out.double() - mean) / scale) @ weights + targets.mean(dim=0)
    return float((said.argmax(dim=1) == true).double().mean())


def ridge(samples: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Return the weights (d, c) that minimize |samples · W - targets|² + penalty |W|²."""
    eye = torch.eye(samples.shape[1], dtype=samples.dtype, device=samples.device)
    normal = samples.T @ samples + penalty * eye
    return torch.cholesky_solve(samples.T @ targets, torch.linalg.cholesky(normal))
