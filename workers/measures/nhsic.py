"""The normalized Hilbert-Schmidt independence criterion, as Sakamoto and Sato (arXiv 2402.09050) use it: that of Ma,
Lewis and Kleijn (arXiv 1908.01580), after the normalized cross-covariance operator of Fukumizu et al. (2008).

    nHSIC(X, Z) = tr(R_X R_Z),   R = K (K + ε m I)⁻¹,   K = H G H,   G_ij = exp(-|x_i - x_j|² / (2 σ² d))

of m samples of d numbers, H = I - 11ᵀ/m, σ = 5, ε = 1e-5. Their code centres K on one side alone, which gives the same
trace. It is about the number of directions of X that Z tells apart, at most m - 1; with one-hot targets of c classes at
most c - 1. It grows with m, so only figures of equally large blocks are compared.

With that width it depends on the scale of the samples: where they differ by much less than σ√d, all look alike. The
other rule takes the median of |x_i - x_j|², i < j, in place of σ² d (their mean where it is 0), which no scale changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from workers.specs.tasks import Bandwidth

SIGMA = 5.0
EPSILON = 1e-5


def gaussian_gram(samples: Tensor, bandwidth: Bandwidth = "fixed") -> Tensor:
    """Return the kernel matrix (m, m) of samples (m, d)."""
    squared = (samples * samples).sum(dim=1)
    distances = (squared[:, None] + squared[None, :] - 2 * samples @ samples.T).clamp_min(0)
    return torch.exp(-distances / (2 * _WIDTHS[bandwidth](distances, samples.shape[1])))


def _fixed(distances: Tensor, width: int) -> Tensor | float:
    return SIGMA**2 * width


def _median(distances: Tensor, width: int) -> Tensor | float:
    rows, columns = torch.triu_indices(len(distances), len(distances), 1, device=distances.device)
    pairs = distances[rows, columns]
    found = pairs.median()
    # Where most samples are the same, and where all are.
    return found if found > 0 else pairs.mean() if pairs.any() else 1.0


#: Rule -> squared width of the kernel, of the squared distances (m, m) of samples of so many numbers.
_WIDTHS: Mapping[Bandwidth, Callable[[Tensor, int], Tensor | float]] = {"fixed": _fixed, "median": _median}


def smoother(samples: Tensor, bandwidth: Bandwidth = "fixed") -> Tensor:
    """Return R (m, m) of samples (m, d), in double precision: symmetric, eigenvalues 0..1."""
    gram = gaussian_gram(samples.double(), bandwidth)
    centred = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
    size = len(gram)
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    ridge = EPSILON * size
    # K (K + rI)⁻¹ = I - r (K + rI)⁻¹.
    return eye - ridge * torch.cholesky_inverse(torch.linalg.cholesky(centred + ridge * eye))


def nhsic(one: Tensor, other: Tensor) -> float:
    """Return the criterion of two smoothers of the same samples."""
    return float((one * other).sum())
