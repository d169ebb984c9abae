"""Write and read safetensors files whose bytes depend on the tensors and the metadata alone.

The library's own writer puts metadata of several keys in a random order. Everything else is as it writes it: without
metadata, or with one key, the bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_store.formats.codec import Array
from cache_store.storage.base import PIECE_BYTES, Stream
from cache_store.storage.durable import write_atomically

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
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALIGNMENT = 8


class TensorStream(Stream):
    """The bytes of a file, made tensor by tensor while they are written.

    Tensors may lie on any device and in any layout; contiguous ones on the host are not copied, others a piece at a
    time. They must not change before the file is written. ValueError: a dtype that the format does not know.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype not in _NAMES:
                raise ValueError(f"{name}: {tensor.dtype} cannot be kept in a safetensors file")
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        place = 0
        self._tensors: dict[str, Tensor] = {}
        for name in sorted(tensors, key=lambda name: (_PLACES[tensors[name].dtype], name)):
            tensor = self._tensors[name] = tensors[name].detach()
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [place, place + tensor.nbytes],
            }
            place += tensor.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._head = len(text).to_bytes(8, "little") + text
        self.nbytes = len(self._head) + place

    def pieces(self) -> Iterator[memoryview]:
        yield memoryview(self._head)
        for tensor in self._tensors.values():
            yield from pieces_of(tensor)


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's values in C order, as bytes, in pieces."""
    for start, stop in cuts(tensor):
        yield cut(tensor, start, stop).cpu().numpy().data


def cuts(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield where a tensor's values are cut into pieces: first byte and the one after the last. Of a tensor that is not
    contiguous a piece has whole rows, so that it takes a copy of those alone."""
    size = tensor.nbytes
    if not tensor.is_contiguous():
        row = size // len(tensor)
        step = max(1, PIECE_BYTES // row) * row
    else:
        step = PIECE_BYTES
    for start in range(0, size, step):
        yield start, min(start + step, size)


def cut(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Cut one of `cuts` out of a tensor: uint8 (stop - start,) on its device, without a copy where it is contiguous."""
    if tensor.is_contiguous():
        return tensor.view(-1).view(torch.uint8)[start:stop]
    row = tensor.nbytes // len(tensor)
    rows = tensor[start // row : stop // row]
    if rows.device.type == "cpu":
        # In this thread: torch would start others for it, beside those that train.
        rows = torch.from_numpy(np.ascontiguousarray(rows.view(_INTEGERS[rows.element_size()]).numpy()))
    return rows.contiguous().view(-1).view(torch.uint8)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file whole or not at all, on disk when it returns. ValueError as `TensorStream`, StoreErrors as
    `Storage.write`."""
    write_atomically(path, TensorStream(tensors, metadata).pieces())


def parse(data: Array) -> dict[str, Tensor]:
    """Read the tensors of a file that was verified: views of `data`, (bytes,) uint8 that may be changed."""
    whole = torch.from_numpy(data)
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:begin].tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        # An empty tensor may lie where its type may not begin.
        values = whole[begin + start : begin + stop] if start < stop else torch.empty(0, dtype=torch.uint8)
        found[name] = values.view(dtype).view(entry["shape"])
    return found
