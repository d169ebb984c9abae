"""Define what data nodes commit: where a prepared data set lies in the store, and what is known of it. Loads no torch.

Reading and writing is as in `workers.specs.results`. `origin`, `seconds` and `where` are None until the data node
commits: what prepares a data set does not know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.specs.results import Record, Where


@dataclass(frozen=True, kw_only=True)
class ImageDataResult(Record):
    """A prepared image data set: the sets of its two files (the same one where there is no test file), a digest of what
    they hold, how many rows each has, and how many classes there are. `rows` also has `held_out` where the last rows of
    train are a validation split."""

    OMITTED = ("classes", "skipped", "origin", "seconds", "where")

    train: str
    test: str
    digest: str
    rows: Mapping[str, int]
    classes: int | None = None
    #: Files that are no images, by suffix; None where there are none.
    skipped: Mapping[str, int] | None = None
    #: The task that made it, as JSON values.
    origin: Mapping[str, Any] | None = None
    seconds: float | None = None
    where: Where | None = None


@dataclass(frozen=True, kw_only=True)
class TextSplit(Record):
    """One split of a prepared text data set: the sets of its tokens and of its samples."""

    tokens: str
    samples: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class LengthFigures(Record):
    """Lengths in tokens: how many there are, and the figures that none has where there are none. `p5`: 5 % are at most
    that long."""

    OMITTED = ("min", "max", "mean", "p5", "p50", "p95", "p99")

    count: int
    min: int | None = None
    max: int | None = None
    mean: float | None = None
    p5: int | None = None
    p50: int | None = None
    p95: int | None = None
    p99: int | None = None


@dataclass(frozen=True, kw_only=True)
class Finding(Record):
    """How often something odd was found in records, and in which records first."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SplitStatistics(Record):
    """What a split's documents and samples are like. `documents`: before anything was cut; `samples`: as stored."""

    OMITTED = ("skipped", "findings")

    documents: LengthFigures
    samples: LengthFigures
    #: Of the samples stored; `targets` are the tokens that count in the loss.
    tokens: int
    targets: int
    #: Sequences that were cut, left out as too long, and without a token; samples left out because nothing in them
    #: counts.
    truncated: int
    dropped: int
    empty: int
    without_targets: int
    #: Rows that could not be used; None where none was.
    skipped: int | None = None
    #: What was odd in the records, in words.
    findings: Mapping[str, Finding] | None = None


@dataclass(frozen=True, kw_only=True)
class TextDataResult(Record):
    """A prepared text data set. `rows`, `tokens` and `statistics` are by split."""

    OMITTED = ("warnings", "origin", "seconds", "where")

    train: TextSplit
    validation: TextSplit
    test: TextSplit
    digest: str
    #: Samples, and their tokens.
    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    #: The token that pads.
    pad: int
    #: Digest of the tokenizer, and how many tokens it knows.
    tokenizer: str
    vocabulary: int
    packed: bool
    #: Whether positions restart inside samples, where documents do.
    restarts: bool
    statistics: Mapping[str, SplitStatistics]
    #: Sentences for the user.
    warnings: tuple[str, ...] | None = None
    #: The task that made it, as JSON values: a stage needs it only to make again what was lost.
    origin: Mapping[str, Any] | None = None
    seconds: float | None = None
    where: Where | None = None

    def split(self, name: str) -> TextSplit:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


DataResult = ImageDataResult | TextDataResult


@dataclass(frozen=True, kw_only=True)
class DataFigures(Record):
    """What a prepared data set came to, read without the rest, whichever of the two results it is."""

    rows: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] | None = None
    #: Of text, by split.
    statistics: Mapping[str, SplitStatistics] | None = None
    warnings: tuple[str, ...] = ()
