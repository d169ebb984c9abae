"""The arithmetic of block-scaled encodings: one byte a value and a scale a block, on whatever device the values are.

Every function is elementwise or a maximum, so neither batch nor threads change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cache_store.formats.torch_dtypes import TORCH

#: Smallest scale: below it a quotient would need subnormal numbers, which some devices flush to zero.
_TINY = torch.finfo(torch.float32).tiny


def _scaled_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return codes * scale  # promoted: the product is float32


def _scaled_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    # The bits of a float16 that is 2^8 smaller, subnormals too: several times faster than torch's conversion.
    shifted = (codes.to(torch.int16) << 7) & ~(1 << 14)
    return shifted.view(torch.float16) * (scale * 256.0)


@dataclass(frozen=True)
class _Code:
    """A type of code. `largest`: its largest finite value; `rounded`: codes of scaled values; `scaled`: float32 values
    of codes, given as int8 bits, and their scales."""

    largest: float
    rounded: Callable[[Tensor], Tensor]
    scaled: Callable[[Tensor, Tensor], Tensor]


_CODES = {
    "int8": _Code(127.0, lambda values: values.round().to(torch.int8), _scaled_int8),
    "float8_e4m3fn": _Code(448.0, lambda values: values.to(torch.float8_e4m3fn), _scaled_fp8),
}


def quantize(rows: Tensor, shape: tuple[int, ...], block: int, code: str) -> tuple[Tensor, Tensor]:
    """Return codes (N, *shape) of dtype `code` and scales (N, blocks) of rows (N, *shape), `block` values a scale."""
    kind = _CODES[code]
    blocks = _blocks(rows.float(), shape, block)
    scale = (blocks.abs().amax(-1) / kind.largest).clamp_min(_TINY)
    codes = kind.rounded((blocks / scale.unsqueeze(-1)).nan_to_num(0.0))
    return _rows(codes, shape).contiguous(), scale


def dequantize(codes: Tensor, scale: Tensor, shape: tuple[int, ...], block: int, code: str, dtype: str) -> Tensor:
    """Return the rows (N, *shape) of `dtype`, a new tensor, of what `quantize` returned with `block` and `code`."""
    blocks = _blocks(codes.view(torch.int8), shape, block)
    scale = scale.view(*blocks.shape[:-1], 1)
    return _rows(_CODES[code].scaled(blocks, scale), shape).to(TORCH[dtype])


def _blocks(rows: Tensor, shape: tuple[int, ...], block: int) -> Tensor:
    """(N, blocks, values), a short last block filled up with zeros."""
    if len(shape) == 3:
        return rows.reshape(len(rows), shape[0], -1)
    last = shape[-1]
    short = -last % block
    if short and last > block:
        rows = F.pad(rows, (0, short))
    return rows.reshape(len(rows), -1, min(block, last))


def _rows(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_blocks`."""
    if math.prod(blocks.shape[1:]) == math.prod(shape):
        return blocks.reshape(len(blocks), *shape)
    return blocks.reshape(len(blocks), *shape[:-1], -1)[..., : shape[-1]]
