"""The number types that boundaries, weights and shards hold: names, stand-ins in numpy, sizes. Loads no numpy."""

from __future__ import annotations

#: How each dtype is kept, as numpy writes types; bfloat16 and float8, which numpy and Arrow lack, as their bits.
STORED: dict[str, str] = {
    "float32": "<f4",
    "bfloat16": "<u2",
    "float16": "<f2",
    "float8_e4m3fn": "|u1",
    "uint8": "|u1",
    "int8": "|i1",
    "int32": "<i4",
    "int64": "<i8",
}
#: Bytes of one value.
ITEM_BYTES: dict[str, int] = {name: int(stored[-1]) for name, stored in STORED.items()}
