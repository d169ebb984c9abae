"""The number types of `dtypes` as torch has them."""

from __future__ import annotations

import torch

from cache_store.formats.dtypes import STORED

#: Name -> torch's type of that name.
TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in STORED}
#: What numpy has no type for, and the unsigned integers that stand for it there.
BITS: dict[torch.dtype, torch.dtype] = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
