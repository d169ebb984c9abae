"""What a set is: its key, rows, fields and geometry, and the id that covers them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from cache_store.formats import codec
from cache_store.formats.codec import Array, Field
from cache_store.formats.layouts import SHARD_LAYOUTS
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

    `cuts`, where given, makes a *ragged* set, whose samples are runs of rows of different lengths (tokens): shard
    `i` holds rows `cuts[i]` up to `cuts[i + 1]`, so that none cuts a sample in two. Then `shard_rows` is the
    longest shard's rows, and `group_rows` counts samples; `ragged` fills both in.

    `codec_version`: how a shard's file is laid out, one of `cache_store.formats.layouts.SHARD_LAYOUTS`.
    """

    key: Mapping[str, Any]
    rows: int
    fields: tuple[Field, ...]
    group_rows: int
    shard_rows: int
    cuts: tuple[int, ...] | None = None
    codec_version: int = codec.VERSION

    @classmethod
    def ragged(
        cls,
        key: Mapping[str, Any],
        fields: tuple[Field, ...],
        group_rows: int,
        cuts: Iterable[int],
        codec_version: int = codec.VERSION,
    ) -> SetSpec:
        """Describe the set whose shards begin and end at `cuts`: 0 first, strictly ascending, the number of rows last.
        ValueError when they are not that."""
        whole = tuple(int(cut) for cut in cuts)
        longest = max((stop - start for start, stop in pairwise(whole)), default=0)
        return cls(key, whole[-1] if whole else 0, fields, group_rows, longest, whole, codec_version)

    def __post_init__(self) -> None:
        for name in ("rows", "group_rows", "shard_rows"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_ROWS:
                raise ValueError(f"{name} is {value!r}: it must be an int of at least 1")
        if self.cuts is not None:
            self._check_cuts(self.cuts)
        elif self.shard_rows % self.group_rows and self.shard_rows < self.rows:
            raise ValueError(
                f"shard_rows {self.shard_rows} is not a multiple of group_rows {self.group_rows}: "
                "a group would lie in two shards"
            )
        if type(self.codec_version) is not int or self.codec_version not in SHARD_LAYOUTS:
            raise ValueError(f"codec version {self.codec_version!r}: known are {', '.join(map(str, SHARD_LAYOUTS))}")
        names = [field.name for field in self.fields]
        if not 1 <= len(names) <= _MAX_FIELDS or len(set(names)) != len(names):
            raise ValueError(f"fields {names}: 1 to {_MAX_FIELDS} different names")

    def _check_cuts(self, cuts: tuple[int, ...]) -> None:
        if len(cuts) < 2 or any(type(cut) is not int for cut in cuts) or cuts[0] != 0 or cuts[-1] != self.rows:
            raise ValueError(f"cuts: {len(cuts)} given; they must be ints, the first 0, the last rows ({self.rows})")
        lengths = [stop - start for start, stop in pairwise(cuts)]
        if min(lengths) < 1:
            raise ValueError("cuts must ascend: every shard holds at least one row")
        if max(lengths) != self.shard_rows:
            raise ValueError(f"shard_rows is {self.shard_rows}: with these cuts the longest shard has {max(lengths)}")

    @cached_property
    def id(self) -> str:
        """Hash of key, rows, fields, geometry and codec version: 32 hex characters."""
        return digest_json(self.to_json())

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows) if self.cuts is None else len(self.cuts) - 1

    @property
    def row_bytes(self) -> int:
        """Bytes of values a row."""
        return sum(field.bytes for field in self.fields)

    @property
    def bytes(self) -> int:
        """Bytes of values in the whole set; files are about a kilobyte a shard larger, packed ones mostly smaller."""
        return self.rows * self.row_bytes

    def shard_range(self, i: int) -> range:
        """Return the rows in shard `i`. IndexError when there is no such shard."""
        if not 0 <= i < self.shards:
            raise IndexError(f"shard {i} of a set of {self.shards}")
        if self.cuts is not None:
            return range(self.cuts[i], self.cuts[i + 1])
        return range(i * self.shard_rows, min((i + 1) * self.shard_rows, self.rows))

    def locate(self, rows: Array) -> tuple[Array, Array]:
        """Return (shard, row inside it) of every row of the set: int64 arrays shaped as `rows`, which is int64 and
        inside the set (not checked)."""
        if self.cuts is None:
            shards, local = np.divmod(rows, self.shard_rows)
            return shards, local
        shards = np.searchsorted(self._cuts, rows, side="right") - 1
        return shards, rows - self._cuts[shards]

    @cached_property
    def _cuts(self) -> Array:
        return np.array(self.cuts, np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return what set.json holds, and what the id hashes."""
        record = {
            "format": FORMAT,
            "codec": self.codec_version,
            "key": dict(self.key),
            "rows": self.rows,
            "fields": [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape)} for f in self.fields],
            "group_rows": self.group_rows,
            "shard_rows": self.shard_rows,
        }
        # Left out where there are none: sets made before there were cuts keep their ids.
        return record if self.cuts is None else {**record, "cuts": list(self.cuts)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SetSpec:
        """Return the spec in a set.json. ValueError, TypeError or KeyError when it is not one of this version."""
        if record["format"] != FORMAT or not isinstance(record["key"], dict):
            raise ValueError("not a set of this version")
        if len(record["fields"]) > _MAX_FIELDS:
            raise ValueError("too many fields")
        fields = tuple(Field(f["name"], f["dtype"], tuple(f["shape"])) for f in record["fields"])
        cuts = tuple(record["cuts"]) if "cuts" in record else None
        geometry = (record["rows"], fields, record["group_rows"], record["shard_rows"], cuts)
        return cls(record["key"], *geometry, record["codec"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SetSpec) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)
