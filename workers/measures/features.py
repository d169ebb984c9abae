"""Make vectors of boundaries: what all measures look at.

Maps are averaged over the squares of a grid, tokens over runs of neighbours, as finely as leaves at most
`MOST_FEATURES` numbers a sample; what is wider even then goes through a fixed random projection, which keeps distances
about (Johnson and Lindenstrauss; signs after Achlioptas, 2003).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from workers.models.chain import Boundary
from workers.seeds import derive_seed
from workers.specs.tasks import MOST_FEATURES


def features(boundary: Boundary) -> Tensor:
    """Return (B, at most `MOST_FEATURES`) float32 of fields (B, channels, height, width), (B, tokens, width) or of any
    other shape, which are vectors."""
    fields = [tensor.float() for tensor in boundary]
    cells = _cells([tuple(field.shape[1:]) for field in fields])
    flat = torch.cat([_pooled(field, cells) for field in fields], dim=1)
    return flat if flat.shape[1] <= MOST_FEATURES else flat @ _signs(flat.shape[1]).to(flat.device)


def _cells(shapes: Sequence[tuple[int, ...]]) -> int:
    """Return how many cells an axis is cut into: as many as keep all fields within `MOST_FEATURES`, at least one."""
    longest = max((max(_axes(shape), default=1) for shape in shapes), default=1)
    return next((cells for cells in range(longest, 1, -1) if sum(_width(s, cells) for s in shapes) <= MOST_FEATURES), 1)


def _axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that are averaged over: height and width of maps, of tokens their number."""
    return {3: shape[1:], 2: shape[:1]}.get(len(shape), ())


def _width(shape: tuple[int, ...], cells: int) -> int:
    axes = _axes(shape)
    return math.prod(shape) // math.prod(axes) * math.prod(min(cells, length) for length in axes)


def _pooled(field: Tensor, cells: int) -> Tensor:
    axes = [min(cells, length) for length in _axes(tuple(field.shape[1:]))]
    if len(axes) == 2:
        return F.adaptive_avg_pool2d(field, (axes[0], axes[1])).flatten(1)
    if len(axes) == 1:
        return F.adaptive_avg_pool1d(field.transpose(1, 2), axes[0]).flatten(1)
    return field.flatten(1)


@lru_cache(maxsize=2)
def _signs(width: int) -> Tensor:
    """Return the projection (width, MOST_FEATURES): a function of the width alone."""
    bits = np.random.Philox(key=derive_seed(0, "features", width)).random_raw(width * MOST_FEATURES) & 1
    signs = torch.from_numpy((2.0 * bits - 1.0).astype(np.float32)).view(width, MOST_FEATURES)
    return signs / math.sqrt(MOST_FEATURES)
