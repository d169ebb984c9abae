"""The first samples of a text data set as training will see them: text, tokens, and which of these count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from workers.data.text.corpora.base import Record
from workers.data.text.formats import TEXT_FORMATS, data_is_packed, open_corpus, packing_of
from workers.data.text.samples.layout import cut_overlong
from workers.data.text.samples.ragged import offsets_of
from workers.data.text.splits import split_documents
from workers.data.text.tokens.encode import Encoded
from workers.data.text.tokens.sound import encode_sound
from workers.data.text.tokens.tokenizers import Tokenizer, load_tokenizer
from workers.specs.language import CausalLMSpec, TextSpec


@dataclass(frozen=True)
class Run:
    """Consecutive tokens that all count as targets, or none of which does: their text and their numbers."""

    text: str
    tokens: tuple[int, ...]
    target: bool


@dataclass(frozen=True)
class ShownSample:
    """One document of a split (of a task: one answer to a question). `where`: file and row; `cut`: tokens beyond
    `data.sequence_length`, which are not shown."""

    where: str
    runs: tuple[Run, ...]
    cut: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(run.tokens) for run in self.runs)

    @property
    def targets(self) -> int:
        return sum(len(run.tokens) for run in self.runs if run.target)


@dataclass(frozen=True)
class Preview:
    """The first samples of a split. `documents`: how many the split has; `problems`: rows among the first that cannot
    be used; `findings`: what was odd in the others; `notes`: what the data are made of; `joined`: samples are documents
    joined to this many tokens."""

    samples: tuple[ShownSample, ...]
    documents: int
    problems: tuple[str, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    joined: int | None = None


def preview_text(data: TextSpec, model: CausalLMSpec, seed: int, split: str, rows: int) -> Preview:
    """Read and encode the first `rows` documents of a split, as preparing the data would. DataError and ConfigError as
    `prepare_text`, but rows that cannot be used are described."""
    form = TEXT_FORMATS[data.name]
    corpus = open_corpus(data)
    tokenizer = load_tokenizer(model)
    encoder = form.encoder(tokenizer, data)
    parts = split_documents(data, seed, corpus.documents)
    if data.shots:
        corpus.draw_shots(parts["train"][1], seed)
    own, numbers = parts[split]
    wanted = np.zeros(corpus.documents[own], bool)
    wanted[numbers[:rows]] = True
    found = itertools.islice(corpus.records(own, wanted), int(wanted.sum()))
    candidates = form.candidates > 1 and split != "train"
    sound = encode_sound([record for _, record in found], lambda some: encoder(some, candidates))
    encoded, packed = sound.encoded, data_is_packed(data)
    return Preview(
        samples=tuple(_samples(data, tokenizer, encoded, sound.records, whole=packing_of(data) == "cut")),
        documents=len(numbers),
        problems=tuple(fault.error.message for fault in sound.faults),
        findings=tuple(f"{item.count} times: {what}" for what, item in encoded.findings.found().items()),
        notes=corpus.notes,
        joined=data.sequence_length if packed else None,
    )


def _samples(
    data: TextSpec, tokenizer: Tokenizer, encoded: Encoded, records: list[Record], *, whole: bool
) -> Iterator[ShownSample]:
    lengths = encoded.lengths
    if not whole:
        keep_end = TEXT_FORMATS[data.name].candidates > 1
        encoded, _ = cut_overlong(encoded, data.sequence_length, keep_end)
    ends = offsets_of(encoded.lengths)
    for index, owner in enumerate(encoded.owners.tolist()):
        inside = slice(ends[index], ends[index + 1])
        record = records[owner]
        yield ShownSample(
            f"row {record.row} of {record.file}",
            tuple(_runs(tokenizer, encoded.tokens[inside], encoded.flags[inside].astype(bool))),
            int(lengths[index] - encoded.lengths[index]),
        )


def _runs(tokenizer: Tokenizer, tokens: np.ndarray, counts: np.ndarray) -> Iterator[Run]:
    """Split a sample where targets begin and end."""
    edges = np.flatnonzero(np.diff(counts)) + 1
    for own, flags in zip(np.split(tokens, edges), np.split(counts, edges), strict=True):
        if len(own):
            yield Run(tokenizer.decode(own), tuple(own.tolist()), bool(flags[0]))
