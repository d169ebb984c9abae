"""What a text data set is, without a tokenizer: found, counted, fingerprinted. No torch, no transformers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from workers.data.text.corpora.base import BYTES_PER_TOKEN, FORMAT, SPLITS, Corpus, Record
from workers.data.text.formats import TEXT_FORMATS, data_is_packed, open_corpus
from workers.data.text.sample import sample_of
from workers.data.text.splits import split_documents
from workers.specs.language import TextSpec


@dataclass(frozen=True)
class TextOutline:
    """A text data set in figures.

    `documents`: those of each split (of a task: questions); `bytes`: about their text; `rows`: samples of each split,
    exact where a sample is a document that is not dropped, else estimated from the bytes; `fingerprint` (sha256, hex)
    changes with the documents, and with how they become tokens (`FORMAT`); `notes`: what the splits are made of where
    that is not what one expects; `sample`: some documents of train, where a template may refuse one.
    """

    documents: dict[str, int]
    bytes: int
    rows: dict[str, int]
    fingerprint: str
    notes: tuple[str, ...] = ()
    sample: tuple[Record, ...] = field(default=(), repr=False, compare=False)


def inspect_text(data: TextSpec, seed: int = 0) -> TextOutline:
    """Describe a text data set: reads listings, Parquet footers and counts lines; of tasks and stdlib, all.

    DataError, all problems of the files at once: nothing at `path`, unreadable or empty files, no such column (with
    the nearest one), a broken question. ConfigError: a split without documents, a hub data set that is not pinned.
    `seed` changes no figure, only which documents are meant.
    """
    corpus = open_corpus(data)
    parts = split_documents(data, seed, corpus.documents)
    documents = {split: len(numbers) for split, (_, numbers) in parts.items()}
    rows = dict(documents)
    if data_is_packed(data):
        limits = {"train": data.train_limit, "validation": data.validation_limit, "test": data.test_limit}
        for split, (own, numbers) in parts.items():
            size = corpus.bytes[own] * len(numbers) / corpus.documents[own]
            estimate = max(1, round(size / BYTES_PER_TOKEN / data.sequence_length))
            rows[split] = min(estimate, limits[split] or estimate)
    for split in ("validation", "test"):
        rows[split] *= TEXT_FORMATS[data.name].candidates
    return TextOutline(
        documents={split: documents[split] for split in SPLITS},
        bytes=sum(corpus.bytes.values()),
        rows={split: rows[split] for split in SPLITS},
        fingerprint=fingerprint_of(corpus),
        notes=corpus.notes,
        sample=sample_of(corpus, seed) if TEXT_FORMATS[data.name].rendered else (),
    )


def fingerprint_of(corpus: Corpus) -> str:
    """Return the fingerprint of a data set as nodes of a plan hold it."""
    return hashlib.sha256(f"text {FORMAT} {corpus.fingerprint}".encode()).hexdigest()
