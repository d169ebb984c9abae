"""How a shard's columns lie in its file, by codec version: a row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache_store.formats import codec, packed
from cache_store.formats.codec import Array, Field

if TYPE_CHECKING:
    from cache_store.storage.base import Buffer


@dataclass(frozen=True)
class ShardLayout:
    """`encode(fields, arrays)`: the pieces of a file; `decode(buffer, fields, rows)`: the arrays in one. `mapped`:
    whether decoded arrays lie in the buffer itself, so that a mapped file serves them without taking memory."""

    encode: Callable[[Sequence[Field], Sequence[Array]], list[Buffer]]
    decode: Callable[[Buffer, Sequence[Field], int], tuple[Array, ...]]
    mapped: bool


SHARD_LAYOUTS = {
    codec.VERSION: ShardLayout(codec.encode, codec.decode, mapped=True),
    codec.PACKED: ShardLayout(packed.encode, packed.decode, mapped=False),
}
