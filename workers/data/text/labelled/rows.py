"""What a row of labelled text is: which columns make it, when it can be used, and the number of its class. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache_store.errors import DataError
from cache_store.suggest import did_you_mean
from workers.data.text.corpora.base import Record, broken, clean
from workers.data.text.corpora.rows.columns import Columns, Values, missing_column

#: All that a column can be.
WORDS = ("text", "pair", "label")
#: Usual names of a text, or of the two of a pair, in the order in which they are looked for.
_TEXTS: tuple[tuple[str, str | None], ...] = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", None),
    ("sentence", None),
)
_LABELS = ("label", "labels")
#: Classes beyond which a column is taken for something else than a label.
MOST_CLASSES = 10_000
_SHOWN = 8


@dataclass(frozen=True)
class Labelled:
    """One row. `pair`: the second text, None where samples have one. `label`: as the file has it."""

    text: Any
    pair: Any
    label: Any
    paired: bool


def labelled_columns(where: str, found: Sequence[str], named: Mapping[str, str]) -> Columns:
    """Find the columns of a file that has these. `named`: what a column is -> its name. DataError: none are there."""
    for name in named.values():
        if name not in found:
            raise missing_column(where, name, found, "data.columns")
    needed = {**_texts(where, found, named), "label": label_column(where, found, named)}
    paired = "pair" in needed

    def row(values: Values) -> Labelled:
        return Labelled(values["text"], values.get("pair"), values["label"], paired)

    return Columns(needed, row)


def _texts(where: str, found: Sequence[str], named: Mapping[str, str]) -> dict[str, str]:
    if "text" in named:
        return {what: named[what] for what in ("text", "pair") if what in named}
    for text, pair in _TEXTS:
        if text in found and (pair is None or pair in found):
            own = {"text": text} if pair is None else {"text": text, "pair": pair}
            return own | {what: named[what] for what in ("pair",) if what in named}
    ways = ", ".join(text if pair is None else f"{text} with {pair}" for text, pair in _TEXTS)
    what = f"has no column of texts (it has {', '.join(found) or 'none'}; looked for: {ways})"
    raise DataError(f"data.columns: {where} {what}; data.columns.text names it", what=what)


def label_column(where: str, found: Sequence[str], named: Mapping[str, str]) -> str:
    """Find the column of labels. DataError: there is none."""
    label = named.get("label") or next((name for name in _LABELS if name in found), None)
    if label is None:
        raise missing_column(where, _LABELS[0], found, "data.columns.label")
    return label


def label_of(record: Record) -> str:
    """A row's label as text. DataError, naming the row: there is none."""
    label = record.value.label
    if isinstance(label, bool):
        return str(label).lower()
    if label is None or (isinstance(label, str) and not label.strip()):
        raise broken(record, "it has no label")
    if not isinstance(label, int | str):
        raise broken(record, f"its label is {label!r}; allowed: a text or a whole number")
    text = clean(str(label)).strip()
    if _number(text) is not None and int(text) < 0:
        raise broken(record, f"its label is {text}, which stands for none; allowed: numbers from 0")
    return text


def texts_of(record: Record) -> tuple[str, str | None]:
    """A row's texts; the second is None where rows have one. DataError, naming the row: they are no texts, or empty."""
    row = record.value
    for what, value in (("text", row.text), *([("pair", row.pair)] if row.paired else [])):
        if value is None or value == "":
            raise broken(record, f"its {what} is empty")
        if not isinstance(value, str):
            raise broken(record, f"its {what} is a {type(value).__name__}; allowed: a text")
    return clean(row.text), clean(row.pair) if row.paired else None


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels as names of classes: by number where all are numbers, else by the alphabet."""
    found = sorted(set(labels))
    return tuple(sorted(found, key=int) if all(_number(label) is not None for label in found) else found)


class Classes:
    """Names of classes, and the numbers that rows have among them. `given`: what a number means is known, so a label
    may be a number of this list."""

    def __init__(self, names: Sequence[str], *, given: bool) -> None:
        self.names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._given = given

    def number(self, record: Record) -> int:
        """The class of a row, from 0. DataError, naming the row: it has no label, or one that is no class."""
        label = label_of(record)
        if label in self._numbers:
            return self._numbers[label]
        index = _number(label)
        if self._given and index is not None and 0 <= index < len(self.names):
            return index
        shown = ", ".join(self.names[:_SHOWN]) + (", …" if len(self.names) > _SHOWN else "")
        numbers = f", or 0 to {len(self.names) - 1}" if self._given else ""
        hint = did_you_mean(label, self.names)
        raise broken(record, f"its label {label!r} is none of the classes{hint}; allowed: {shown}{numbers}")


def _number(text: str) -> int | None:
    """A whole number; None for everything else."""
    return int(text) if text.removeprefix("-").isdecimal() and text.isascii() else None
