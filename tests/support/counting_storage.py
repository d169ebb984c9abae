"""A remote store in memory that counts its reads and can damage them."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np

from cache_store.records.files import write_file
from cache_store.storage.memory import MemoryStorage
from cache_store.storage.open import parse_address


class Counting(MemoryStorage):
    """A store whose reads are counted, and may come damaged."""

    remote = True

    def __init__(self) -> None:
        super().__init__(parse_address(f"memory://{uuid.uuid4().hex}"))
        self.reads = 0
        self.damaged = 0

    def _chunks(self, path: str, size: int | None) -> Any:
        self.reads += 1
        for chunk in super()._chunks(path, size):
            data = bytearray(chunk)
            if self.damaged and data:
                data[0] ^= 1
            yield memoryview(data)
        self.damaged = max(0, self.damaged - 1)


def put(storage: Counting, name: str, size: int = 1000) -> Any:
    return write_file(storage, name, np.random.default_rng(len(name)).bytes(size))
