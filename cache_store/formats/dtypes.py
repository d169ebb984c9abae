"""The number types that boundaries, weights and shards hold: names, sizes, stand-ins in numpy. Loads no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

#: How each dtype is kept in numpy; bfloat16 and float8, which numpy and Arrow lack, as their bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float8_e4m3fn": np.dtype("u1"),
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
#: Bytes of one value.
ITEM_BYTES: dict[str, int] = {name: kind.itemsize for name, kind in DTYPES.items()}
