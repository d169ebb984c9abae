"""A prepared split in the store: a set of tokens, a set of samples, and one row that says how large they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cache_store.errors import CorruptShard, MissingShard
from cache_store.formats.codec import Field
from cache_store.keys import digest_json
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from workers.data.missing import missing_shards
from workers.data.text.corpora.base import SPLITS
from workers.data.text.samples.layout import Samples, chunks
from workers.data.text.samples.ragged import offsets_of
from workers.specs.data_results import SplitStatistics, TextDataResult, TextSplit
from workers.specs.results import Record
from workers.specs.tasks import rows_per_shard

SHARD_BYTES = 64 << 20
#: More shards than this would make the record of the cuts too long.
_MAX_SHARDS = 4096
TOKEN_FIELDS = (Field("token", "int32", ()), Field("target", "uint8", ()), Field("position", "int32", ()))
SAMPLE_FIELDS = (Field("start", "int64", ()), Field("length", "int64", ()), Field("targets", "int64", ()))
#: Of splits that hold all candidates of every question.
CANDIDATE_FIELDS = (Field("group", "int64", ()), Field("correct", "uint8", ()))
_SUMMARY = Field("json", "uint8", (1 << 16,))


@dataclass(frozen=True, kw_only=True)
class StoredSplit(Record):
    """What is known of a prepared split before it is opened: how many samples it has, where its token shards begin and
    end (`cuts`), and whether samples say which question they answer."""

    samples: int
    cuts: tuple[int, ...]
    candidates: bool
    statistics: SplitStatistics


def open_sets(snapshots: SnapshotStore, key: Mapping[str, Any], split: StoredSplit) -> tuple[SnapshotSet, SnapshotSet]:
    """Open the token set and the sample set of the split `key` stands for, making them if absent."""
    tokens = SetSpec.ragged({**key, "what": "tokens"}, TOKEN_FIELDS, 1, split.cuts)
    fields = SAMPLE_FIELDS + (CANDIDATE_FIELDS if split.candidates else ())
    rows = rows_per_shard(sum(field.bytes for field in fields), SHARD_BYTES, 1)
    table = SetSpec({**key, "what": "samples"}, split.samples, fields, 1, min(split.samples, rows))
    return snapshots.open(tokens), snapshots.open(table)


def cuts_of(lengths: np.ndarray) -> list[int]:
    """Choose where token shards begin and end: whole samples, about SHARD_BYTES each, in at most 4,096 shards."""
    offsets = offsets_of(lengths)
    row_bytes = sum(field.bytes for field in TOKEN_FIELDS)
    rows = max(SHARD_BYTES // row_bytes, -(-2 * int(offsets[-1]) // _MAX_SHARDS))
    return [0, *(int(offsets[last]) for _, last in chunks(lengths, rows))]


class Summary:
    """What is known of a prepared split before it is opened. It lets a second `prepare_text` find the sets, whose
    addresses cover their sizes, without tokenizing anything."""

    def __init__(self, snapshots: SnapshotStore, key: Mapping[str, Any]) -> None:
        self._set = snapshots.open(SetSpec({**key, "what": "summary"}, 1, (_SUMMARY,), 1, 1))

    def read(self) -> StoredSplit | None:
        """Return what was written; None when there is nothing, or nothing intact."""
        try:
            text = self._set.read(0, lambda arrays: arrays[0].tobytes())
        except (MissingShard, CorruptShard):
            return None
        return StoredSplit.from_json(json.loads(text))

    def write(self, split: StoredSplit) -> None:
        """Publish it; at most 64 KiB of JSON."""
        text = json.dumps(split.to_json(), sort_keys=True).encode()
        row = np.full((1, *_SUMMARY.shape), ord(" "), np.uint8)
        row[0, : len(text)] = np.frombuffer(text, np.uint8)
        self._set.put(0, (row,))


def split_result(tokens: SnapshotSet, table: SnapshotSet) -> TextSplit:
    """Return the addresses of a complete split, and the digest of what it holds. MissingShard when it is not
    complete."""
    return TextSplit(
        tokens=tokens.spec.id, samples=table.spec.id, digest=digest_json([tokens.digest(), table.digest()])
    )


class Vocabulary(Protocol):
    """What a result says of the tokenizer that made it."""

    @property
    def pad(self) -> int:
        """The token that pads."""

    @property
    def digest(self) -> str:
        """What tells it from others."""

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""


def whole_result(
    splits: Mapping[str, TextSplit],
    statistics: Mapping[str, SplitStatistics],
    tokenizer: Vocabulary,
    *,
    packed: bool,
    restarts: bool,
    warnings: Iterable[str],
) -> TextDataResult:
    """Return the result of a data set whose splits (train, validation, test) are complete."""
    return TextDataResult(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        digest=digest_json([splits[split].digest for split in SPLITS]),
        rows={split: statistics[split].samples.count for split in SPLITS},
        tokens={split: statistics[split].tokens for split in SPLITS},
        pad=tokenizer.pad,
        tokenizer=tokenizer.digest,
        vocabulary=tokenizer.vocabulary,
        packed=packed,
        restarts=restarts,
        statistics=statistics,
        warnings=tuple(warnings),
    )


def is_complete(*sets: SnapshotSet) -> bool:
    """Return whether nothing is left to make."""
    return not any(missing_shards(found) for found in sets)


def sample_columns(samples: Samples, candidates: bool) -> tuple[np.ndarray, ...]:
    """Return the arrays of the sample set, of all its rows."""
    columns = (offsets_of(samples.lengths)[:-1], samples.lengths, samples.targets)
    return columns + ((samples.group, samples.correct) if candidates else ())
