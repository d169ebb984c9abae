"""Tokenize a labelled data set once into the store: two sets a split, of tokens and of samples with their classes.

Rows are read in batches, tokenized and spooled to a temporary file, then written as shards. Memory is bounded by a
batch of rows and one shard, plus some bytes a row. What is complete in the store is not tokenized again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cache_store.errors import ConfigError, DataError
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from workers.data.counting import ProgressCounter, ReportCount
from workers.data.missing import missing_shards
from workers.data.text.corpora.base import SPLITS, Record, broken
from workers.data.text.corpora.findings import Findings
from workers.data.text.labelled.corpus import FORMAT, LabelledCorpus, fingerprint_of
from workers.data.text.labelled.rows import Classes, texts_of
from workers.data.text.labelled.stored import open_sets
from workers.data.text.labelled.tokens import PairEncoder
from workers.data.text.samples.ragged import offsets_of
from workers.data.text.samples.spool import Spool
from workers.data.text.samples.statistics import split_statistics, warnings_of
from workers.data.text.samples.stored import StoredSplit, Summary, cuts_of, is_complete, split_result, whole_result
from workers.data.text.splits import split_documents
from workers.data.text.tokens.sound import Fault, refuse
from workers.data.text.tokens.tokenizers import load_tokenizer, longest_sample
from workers.specs.data_results import TextDataResult
from workers.specs.language import CausalLMSpec, LabelledTextSpec
from workers.versions import installed

#: Rows tokenized together: enough to keep a tokenizer's threads busy.
_BATCH = 512


def prepare_labelled(
    data: LabelledTextSpec,
    model: CausalLMSpec,
    seed: int,
    snapshots: SnapshotStore,
    progress: ReportCount | None = None,
    fingerprint: str | None = None,
    tokenizer: str | None = None,
) -> TextDataResult:
    """Tokenize what is not in the store yet, a sample a row, in the order of the files.

    `progress(done=, total=, unit="rows")`. ConfigError: the tokenizer does not fit, `sequence_length` exceeds the
    model's positions, or the tokenizer's digest is not `tokenizer`. DataError: as `LabelledCorpus`; a row that cannot
    be used (file and row); a split in which nothing is left; the files' fingerprint is not `fingerprint`.
    """
    positions = longest_sample(model)
    if positions is not None and data.sequence_length > positions:
        raise ConfigError(f"data.sequence_length: {data.sequence_length}: the model has {positions} positions")
    corpus = LabelledCorpus(data)
    if fingerprint not in (None, fingerprint_of(corpus)):
        raise DataError(f"data.path: the files of {data.path} have changed since the run was planned; run again")
    loaded = load_tokenizer(model)
    if tokenizer not in (None, loaded.digest):
        raise ConfigError(
            f"model.tokenizer: {model.tokenizer or model.path} has changed since the run was planned; run again"
        )
    encoder = PairEncoder(loaded, model)
    parts = split_documents(data.as_text(), seed, corpus.documents)
    counter = ProgressCounter(progress, sum(len(numbers) for _, numbers in parts.values()), "rows")
    splits = {}
    for split, (own, numbers) in parts.items():
        key = {
            "kind": "labelled",
            "version": FORMAT,
            "split": split,
            "fingerprint": corpus.fingerprint,
            "tokenizer": encoder.digest,
            "versions": installed(("tokenizers", "transformers")),
            "seed": seed,
            "bad": data.bad,
            "held_out": [data.validation, data.test],
            "length": data.sequence_length,
            "overlong": data.overlong,
            "limit": getattr(data, f"{split}_limit"),
        }
        splits[split] = _Split(data, split, key, snapshots)
        if splits[split].find():
            counter.add(len(numbers))
            continue
        wanted = np.zeros(corpus.documents[own], bool)
        wanted[numbers] = True
        splits[split].fill((record for _, record in corpus.records(own, wanted)), encoder, corpus.classes, counter)
    return _result(data, encoder, splits)


def _result(data: LabelledTextSpec, encoder: PairEncoder, splits: dict[str, _Split]) -> TextDataResult:
    statistics = {split: splits[split].known.statistics for split in SPLITS}
    results = {split: split_result(*splits[split].sets()) for split in SPLITS}
    warnings = warnings_of(data.as_text(), statistics)
    return whole_result(results, statistics, encoder, packed=False, restarts=False, warnings=warnings)


class _Split:
    """One split on its way into the store: `find`, else `fill`; then `known` and `sets`."""

    def __init__(self, data: LabelledTextSpec, name: str, key: dict[str, Any], snapshots: SnapshotStore) -> None:
        self._data, self._name, self._key, self._snapshots = data, name, key, snapshots
        self._summary = Summary(snapshots, key)
        self._found: StoredSplit | None = None
        self._lengths: list[int] = []
        self._whole: list[int] = []
        self._labels: list[int] = []
        self._counts = {"truncated": 0, "dropped": 0, "empty": 0, "skipped": 0, "without_targets": 0}
        self._findings = Findings()

    @property
    def known(self) -> StoredSplit:
        """What is known of the split; RuntimeError before it is found or filled."""
        if self._found is None:
            raise RuntimeError(f"the split {self._name} is not prepared yet")
        return self._found

    def sets(self) -> tuple[SnapshotSet, SnapshotSet]:
        """Open the sets of tokens and of samples."""
        return open_sets(self._snapshots, self._key, self.known)

    def find(self) -> bool:
        """Return whether the split is complete in the store."""
        self._found = self._summary.read()
        return self._found is not None and is_complete(*self.sets())

    def fill(self, records: Iterator[Record], encoder: PairEncoder, classes: Classes, counter: ProgressCounter) -> None:
        """Tokenize and write. DataError, naming several rows, for what cannot be used, unless `data.bad` skips it."""
        with Spool() as spool:
            pending: list[Record] = []
            for record in records:
                pending.append(record)
                if len(pending) == _BATCH:
                    self._add(pending, encoder, classes, spool)
                    counter.add(len(pending))
                    pending = []
            self._add(pending, encoder, classes, spool)
            counter.add(len(pending))
            self._write(spool)

    def _add(self, records: Sequence[Record], encoder: PairEncoder, classes: Classes, spool: Spool) -> None:
        sound, faults = [], []
        for record in records:
            try:
                if record.error is not None:
                    raise record.error
                sound.append((record, texts_of(record), classes.number(record)))
            except DataError as error:
                faults.append(Fault(record, error))
        if self._data.bad == "refuse":
            refuse(faults)
        self._counts["skipped"] += len(faults)
        for fault in faults:
            self._findings.add(f"skipped: {fault.what}", fault.record)
        encoded = encoder.encode([texts for _, texts, _ in sound])
        for (record, texts, label), (tokens, types) in zip(sound, encoded, strict=True):
            self._whole.append(len(tokens))
            if len(tokens) > self._data.sequence_length:
                if not self._fits(record, len(tokens)):
                    continue
                ((tokens, types),) = encoder.encode([texts], self._data.sequence_length)
            if not len(tokens):
                self._counts["empty"] += 1
                continue
            spool.add(tokens, types)
            self._lengths.append(len(tokens))
            self._labels.append(label)

    def _fits(self, record: Record, tokens: int) -> bool:
        """Tell whether a sample that is too long is cut. DataError where it is refused."""
        if self._data.overlong == "refuse":
            longest = self._data.sequence_length
            what = f"it takes {tokens} tokens; data.sequence_length allows {longest}, and data.overlong refuses longer"
            raise broken(record, what)
        self._counts["truncated" if self._data.overlong == "truncate" else "dropped"] += 1
        return self._data.overlong == "truncate"

    def _write(self, spool: Spool) -> None:
        if not self._lengths:
            counts = ", ".join(f"{count} {what}" for what, count in self._counts.items() if count)
            raise DataError(f"data.{self._name}: no samples are left ({counts or 'none there'})")
        lengths, labels = np.array(self._lengths, np.int64), np.array(self._labels, np.int64)
        statistics = split_statistics(
            np.array(self._whole, np.int64), lengths, np.ones_like(lengths), self._counts, self._findings
        )
        self._found = StoredSplit(
            samples=len(lengths), cuts=tuple(cuts_of(lengths)), candidates=False, statistics=statistics
        )
        tokens, table = self.sets()
        columns = (offsets_of(lengths)[:-1], lengths, labels)
        while missing := missing_shards(table):
            for shard in missing:
                rows = table.spec.shard_range(shard)
                table.put(shard, [column[rows.start : rows.stop] for column in columns])
        while missing := missing_shards(tokens):
            for shard in missing:
                rows = tokens.spec.shard_range(shard)
                tokens.put(shard, spool.read(rows.start, rows.stop))
        self._summary.write(self._found)
