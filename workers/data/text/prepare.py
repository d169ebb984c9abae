"""Tokenize a text data set once into the store: two sets a split, of tokens and of samples.

Documents are read, tokenized in batches by the tokenizer's own threads and spooled to a temporary file; then the
samples are laid out and their shards written one after another. Memory is bounded by a batch of documents and one
shard, plus some bytes a document. What is complete in the store is not tokenized again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from cache_store.errors import ConfigError, DataError
from cache_store.snapshots.store import SnapshotSet, SnapshotStore
from workers.data.counting import ProgressCounter, ReportCount
from workers.data.missing import missing_shards
from workers.data.splits import permutation
from workers.data.text.corpora.base import FORMAT, SPLITS, Corpus, Record, broken
from workers.data.text.corpora.findings import Findings
from workers.data.text.formats import TEXT_FORMATS, data_is_packed, open_corpus, packing_of
from workers.data.text.inspect import fingerprint_of
from workers.data.text.samples.layout import (
    Laid,
    cut_overlong,
    document_samples,
    laid_fields,
    packed_samples,
    whole_samples,
    without,
)
from workers.data.text.samples.ragged import offsets_of
from workers.data.text.samples.spool import Spool
from workers.data.text.samples.statistics import refusals_of, split_statistics, warnings_of
from workers.data.text.samples.stored import (
    StoredSplit,
    Summary,
    cuts_of,
    is_complete,
    open_sets,
    sample_columns,
    split_result,
    whole_result,
)
from workers.data.text.splits import split_documents
from workers.data.text.tokens.encode import Encoded, Encoder
from workers.data.text.tokens.sound import encode_sound, refuse
from workers.data.text.tokens.tokenizers import Tokenizer, load_tokenizer, longest_sample
from workers.specs.data_results import TextDataResult, TextSplit
from workers.specs.language import CausalLMSpec, TextSpec
from workers.versions import installed

#: Documents tokenized together: enough to keep a tokenizer's threads busy.
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 4 << 20


def prepare_text(
    data: TextSpec,
    model: CausalLMSpec,
    seed: int,
    snapshots: SnapshotStore,
    progress: ReportCount | None = None,
    fingerprint: str | None = None,
    tokenizer: str | None = None,
) -> TextDataResult:
    """Tokenize what is not in the store yet.

    Packed: the documents of a split, joined by the end-of-text token, as samples of exactly `sequence_length` tokens
    (the last one shorter); chats whole, as many as fit a sample. Else a sample a document. Longer ones, where they are
    not cut apart by packing, as `overlong` says, cut at their end (a task's question at its beginning, where
    lm-evaluation-harness cuts). Train holds the correct candidate of a question, validation and test all of them. A
    sample in which nothing counts is left out and counted. Limits take samples (packed), documents or questions.

    `progress(done=, total=, unit="documents")`. ConfigError: the tokenizer does not fit (see `load_tokenizer`), has no
    chat template, or `sequence_length` exceeds the model's positions. DataError: as `inspect_text`; a document that
    cannot be used (file and row); a split in which nothing is left; too many samples that lost something (see
    `refusals_of`); the files' fingerprint is not `fingerprint`.
    ConfigError also where the tokenizer's digest is not `tokenizer`.
    """
    _check_length(data, model)
    corpus = open_corpus(data)
    if fingerprint not in (None, fingerprint_of(corpus)):
        raise DataError(f"data.path: the files of {data.path} have changed since the run was planned; run again")
    loaded = load_tokenizer(model)
    if tokenizer not in (None, loaded.digest):
        raise ConfigError(
            f"model.tokenizer: {model.tokenizer or model.path} has changed since the run was planned; run again"
        )
    encoder = TEXT_FORMATS[data.name].encoder(loaded, data)
    parts = split_documents(data, seed, corpus.documents)
    if data.shots:
        corpus.draw_shots(_all_trained(data, seed, corpus), seed)
    splits = {split: _Split(data, seed, split, corpus, loaded, snapshots) for split in SPLITS}
    todo = {split: parts[split] for split in SPLITS if not splits[split].find()}
    with ExitStack() as spools:
        for split in todo:
            splits[split].begin(spools.enter_context(Spool()))
        counter = ProgressCounter(progress, sum(len(numbers) for _, numbers in parts.values()), "documents")
        counter.add(sum(len(numbers) for split, (_, numbers) in parts.items() if split not in todo))
        _tokenize(corpus, encoder, splits, todo, counter)
        for split in todo:
            splits[split].finish()
    return _result(data, loaded, splits)


def _result(data: TextSpec, loaded: Tokenizer, splits: Mapping[str, _Split]) -> TextDataResult:
    """Sum up the prepared splits."""
    statistics = {split: splits[split].known.statistics for split in SPLITS}
    refused = [f"data.{setting}: {text}" for setting, text in refusals_of(data, statistics)]
    if refused:
        raise DataError("\n".join(refused), problems=refused)
    warnings = warnings_of(data, statistics)
    results = {split: splits[split].result() for split in SPLITS}
    packed = data_is_packed(data)
    return whole_result(results, statistics, loaded, packed=packed, restarts=packed and data.isolate, warnings=warnings)


def _check_length(data: TextSpec, model: CausalLMSpec) -> None:
    positions = longest_sample(model)
    if positions is not None and data.sequence_length > positions:
        raise ConfigError(
            f"data.sequence_length: {data.sequence_length} tokens are more than the model has positions for; allowed: "
            f"2 to {positions}"
        )


def _all_trained(data: TextSpec, seed: int, corpus: Corpus) -> np.ndarray:
    """The documents of train whatever its limit, so that examples do not change with it."""
    return split_documents(dataclasses.replace(data, train_limit=None), seed, corpus.documents)["train"][1]


def _tokenize(
    corpus: Corpus,
    encoder: Encoder,
    splits: Mapping[str, _Split],
    todo: Mapping[str, tuple[str, np.ndarray]],
    counter: ProgressCounter,
) -> None:
    """Read every document of the splits to do once, and hand it to its split, in order."""
    for own in dict.fromkeys(own for own, _ in todo.values()):
        names = [split for split in todo if todo[split][0] == own]
        owner = np.full(corpus.documents[own], -1, np.int8)
        for index, split in enumerate(names):
            owner[todo[split][1]] = index
        pending: list[list[Record]] = [[] for _ in names]
        characters = [0] * len(names)

        def flush(index: int, names: list[str] = names, pending: list[list[Record]] = pending) -> None:
            records, pending[index] = pending[index], []
            if records:
                splits[names[index]].add(records, encoder)
                counter.add(len(records))

        for number, record in corpus.records(own, owner >= 0):
            index = int(owner[number])
            pending[index].append(record)
            characters[index] += len(record.value) if isinstance(record.value, str) else 0
            if len(pending[index]) >= _BATCH_DOCUMENTS or characters[index] >= _BATCH_CHARACTERS:
                flush(index)
                characters[index] = 0
        for index in range(len(names)):
            flush(index)


class _Split:
    """One split on its way into the store: `find`; else `begin`, `add` all documents, `finish`; then `result`."""

    def __init__(
        self, data: TextSpec, seed: int, split: str, corpus: Corpus, tokenizer: Tokenizer, snapshots: SnapshotStore
    ) -> None:
        self._data = data
        self._seed = seed
        self._name = split
        self._snapshots = snapshots
        self._packing = packing_of(data)
        questions = TEXT_FORMATS[data.name].candidates > 1
        self._candidates = questions and split != "train"
        self._keep_end = questions
        self._limit = {"train": data.train_limit, "validation": data.validation_limit, "test": data.test_limit}[split]
        self._key = {
            "kind": "text",
            "version": FORMAT,
            "split": split,
            "fingerprint": corpus.fingerprint,
            "tokenizer": tokenizer.digest,
            "versions": installed(("tokenizers", "transformers")),
            "seed": seed,
            "name": data.name,
            "system": data.system,
            "targets": data.targets,
            "bad": data.bad,
            "held_out": [data.validation, data.test],
            "length": data.sequence_length,
            "overlong": None if self._packing == "cut" else data.overlong,
            "packed": self._packing,
            "isolate": self._packing != "none" and data.isolate,
            "shots": data.shots if questions else 0,
            "limit": self._limit,
        }
        self._summary = Summary(snapshots, self._key)
        self._known: StoredSplit | None = None

    @property
    def known(self) -> StoredSplit:
        """What is known of the split; RuntimeError before it is found or finished."""
        if self._known is None:
            raise RuntimeError(f"the split {self._name} is not prepared yet")
        return self._known

    def find(self) -> bool:
        """Return whether the split is complete in the store."""
        self._known = self._summary.read()
        return self._known is not None and is_complete(*self._sets(self._known))

    def begin(self, spool: Spool) -> None:
        """Get ready to take documents."""
        self._spool = spool
        self._documents: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._groups: list[np.ndarray] = []
        self._correct: list[np.ndarray] = []
        self._questions = 0
        self._counts = {"truncated": 0, "dropped": 0, "empty": 0, "skipped": 0}
        self._findings = Findings()

    def add(self, records: Sequence[Record], encoder: Encoder) -> None:
        """Tokenize some documents and append them. DataError, naming several, for what cannot be used, unless
        `data.bad` skips it."""
        sound = encode_sound(records, lambda some: encoder(some, self._candidates))
        if self._data.bad == "refuse":
            refuse(sound.faults)
        self._counts["skipped"] += len(sound.faults)
        for fault in sound.faults:
            self._findings.add(f"skipped: {fault.what}", fault.record)
        records, encoded = sound.records, sound.encoded
        self._documents.append(encoded.lengths[encoded.lengths > 0])
        self._counts["empty"] += int((encoded.lengths == 0).sum())
        self._findings.merge(encoded.findings)
        if self._packing != "cut":
            encoded = self._fit(encoded, records)
        encoded = without(encoded, encoded.lengths == 0)
        self._spool.add(encoded.tokens, encoded.flags)
        self._lengths.append(encoded.lengths)
        self._groups.append(encoded.owners + self._questions)
        self._correct.append(encoded.correct)
        self._questions += len(records)

    def _fit(self, encoded: Encoded, records: Sequence[Record]) -> Encoded:
        longest = self._data.sequence_length
        overlong = encoded.lengths > longest
        if not overlong.any():
            return encoded
        if self._data.overlong == "refuse":
            first = int(overlong.argmax())
            raise broken(
                records[int(encoded.owners[first])],
                f"it takes {int(encoded.lengths[first])} tokens; data.sequence_length allows {longest}, and "
                "data.overlong refuses longer ones",
            )
        if self._data.overlong == "drop":
            # A question goes with all its candidates.
            dropped = np.isin(encoded.owners, encoded.owners[overlong])
            self._counts["dropped"] += int(dropped.sum())
            return without(encoded, dropped)
        encoded, cut = cut_overlong(encoded, longest, self._keep_end)
        self._counts["truncated"] += cut
        return encoded

    def finish(self) -> None:
        """Lay the samples out and write what is missing. DataError when nothing is left."""
        laid = self._laid()
        samples = laid.samples
        if not len(samples.starts):
            cut = (
                "; allowed: a larger data.sequence_length"
                if self._counts["truncated"] + self._counts["dropped"]
                else ""
            )
            raise DataError(
                f"data.{self._name}: no samples are left of {sum(map(len, self._documents))} documents "
                f"({', '.join(f'{count} {what}' for what, count in self._counts.items())}){cut}"
            )
        statistics = split_statistics(
            _joined(self._documents, np.int64), samples.lengths, samples.targets, self._counts, self._findings
        )
        self._known = known = StoredSplit(
            samples=len(samples.starts),
            cuts=tuple(cuts_of(samples.lengths)),
            candidates=self._candidates,
            statistics=statistics,
        )
        tokens, table = self._sets(known)
        columns = sample_columns(samples, self._candidates)
        while missing := missing_shards(table):
            for shard in missing:
                rows = table.spec.shard_range(shard)
                table.put(shard, [column[rows.start : rows.stop] for column in columns])
        while missing := missing_shards(tokens):
            for shard in missing:
                rows = tokens.spec.shard_range(shard)
                tokens.put(shard, laid_fields(laid, rows, self._spool))
        self._summary.write(known)

    def _laid(self) -> Laid:
        """Lay out the samples that count, within the limit (of documents, where they were not limited before)."""
        lengths = _joined(self._lengths, np.int64)
        isolate = self._data.isolate
        if self._packing == "cut":
            table = packed_samples(self._spool.tokens, self._data.sequence_length, self._spool)
        else:
            groups, correct = _joined(self._groups, np.int64), _joined(self._correct, np.uint8)
            table = document_samples(lengths, groups, correct, self._spool)
        counted = table.targets > 0  # of candidates always: their end is kept, and is what counts
        self._counts["without_targets"] = int((~counted).sum())
        table = table.take(np.flatnonzero(counted))
        if self._packing == "whole":
            laid = whole_samples(table, self._data.sequence_length, running=not isolate)
            return self._limited(laid)
        table = table.take(self._within(len(table.starts)))
        table.group = np.unique(table.group, return_inverse=True)[1].astype(np.int64)
        return Laid(table, table, offsets_of(lengths)[:-1] if self._packing == "cut" and isolate else None)

    def _within(self, samples: int) -> np.ndarray:
        """Choose as many samples as the limit allows; where nothing is packed, documents were limited before."""
        if self._packing == "none" or self._limit is None:
            return np.arange(samples)
        return np.sort(permutation(samples, self._seed, f"{self._name} samples")[: self._limit])

    def _limited(self, laid: Laid) -> Laid:
        """Take the samples within the limit, with their pieces."""
        chosen = self._within(len(laid.samples.starts))
        samples = laid.samples.take(chosen)
        samples.starts = offsets_of(samples.lengths)[:-1]
        samples.group = np.arange(len(chosen))
        return replace(
            laid, samples=samples, pieces=laid.pieces.take(np.flatnonzero(np.isin(laid.pieces.group, chosen)))
        )

    def _sets(self, known: StoredSplit) -> tuple[SnapshotSet, SnapshotSet]:
        return open_sets(self._snapshots, self._key, known)

    def result(self) -> TextSplit:
        """Say where the split lies."""
        return split_result(*self._sets(self.known))


def _joined(pieces: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *pieces])
