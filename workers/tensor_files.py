"""Write safetensors files whose bytes depend on the tensors and the metadata alone.

The library's own writer puts metadata of several keys in a random order. Everything else is as it writes it: without
metadata, or with one key, the bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cache_store.storage.base import views_of

if TYPE_CHECKING:
    from cache_store.storage.base import Buffer

#: The format's name of every dtype, in the order in which their tensors lie in a file.
_NAMES: dict[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACES = {dtype: place for place, dtype in enumerate(_NAMES)}
_ALIGNMENT = 8


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[Buffer]:
    """The file's bytes in pieces, to be written one after the other; contiguous host tensors are not copied.

    ValueError: a dtype that the format does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: {tensor.dtype} cannot be kept in a safetensors file")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    columns: list[Buffer] = []
    place = 0
    for name in sorted(tensors, key=lambda name: (_PLACES[tensors[name].dtype], name)):
        tensor = tensors[name].detach().cpu().contiguous()
        column = tensor.reshape(-1).view(torch.uint8).numpy()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + column.nbytes],
        }
        columns.append(column.data)
        place += column.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [len(text).to_bytes(8, "little"), text, *columns]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file in place. ValueError as `pieces`; OSError."""
    with path.open("wb") as file:
        for view in views_of(tuple(pieces(tensors, metadata))):
            file.write(view)
