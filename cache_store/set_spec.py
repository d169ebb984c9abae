"""What a set is: its key, rows, fields and geometry, and the id that covers them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cache_store import codec
from cache_store.codec import Field
from cache_store.keys import digest_json

FORMAT = 1
_MAX_FIELDS = 64
_MAX_ROWS = 1 << 40


@dataclass(frozen=True, eq=False)
class SetSpec:
    """What a set is. `key`: JSON naming everything that determines its values; `rows`: samples; `fields`:
    what each row holds; `group_rows`: rows computed together in one fixed composition; `shard_rows`: rows a
    shard, a multiple of `group_rows` unless one shard holds all. ValueError when these do not fit; the id
    covers them all.
    """

    key: Mapping[str, Any]
    rows: int
    fields: tuple[Field, ...]
    group_rows: int
    shard_rows: int

    def __post_init__(self) -> None:
        for name in ("rows", "group_rows", "shard_rows"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_ROWS:
                raise ValueError(f"{name} is {value!r}: it must be an int of at least 1")
        if self.shard_rows % self.group_rows and self.shard_rows < self.rows:
            raise ValueError(
                f"shard_rows {self.shard_rows} is not a multiple of group_rows {self.group_rows}: "
                "a group would lie in two shards"
            )
        names = [field.name for field in self.fields]
        if not 1 <= len(names) <= _MAX_FIELDS or len(set(names)) != len(names):
            raise ValueError(f"fields {names}: 1 to {_MAX_FIELDS} different names")

    @cached_property
    def id(self) -> str:
        """Hash of key, rows, fields, geometry and codec version: 32 hex characters."""
        return digest_json(self.to_json())

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of values a row."""
        return sum(field.bytes for field in self.fields)

    @property
    def bytes(self) -> int:
        """Bytes of values in the whole set; files are about a kilobyte a shard larger."""
        return self.rows * self.row_bytes

    def shard_range(self, i: int) -> range:
        """The rows in shard `i`. IndexError when there is no such shard."""
        if not 0 <= i < self.shards:
            raise IndexError(f"shard {i} of a set of {self.shards}")
        return range(i * self.shard_rows, min((i + 1) * self.shard_rows, self.rows))

    def to_json(self) -> dict[str, Any]:
        """What set.json holds, and what the id hashes."""
        return {
            "format": FORMAT,
            "codec": codec.VERSION,
            "key": dict(self.key),
            "rows": self.rows,
            "fields": [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape)} for f in self.fields],
            "group_rows": self.group_rows,
            "shard_rows": self.shard_rows,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SetSpec:
        """The spec in a set.json. ValueError, TypeError or KeyError when it is not one of this version."""
        if record["format"] != FORMAT or record["codec"] != codec.VERSION or not isinstance(record["key"], dict):
            raise ValueError("not a set of this version")
        if len(record["fields"]) > _MAX_FIELDS:
            raise ValueError("too many fields")
        fields = tuple(Field(f["name"], f["dtype"], tuple(f["shape"])) for f in record["fields"])
        return cls(record["key"], record["rows"], fields, record["group_rows"], record["shard_rows"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SetSpec) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)
