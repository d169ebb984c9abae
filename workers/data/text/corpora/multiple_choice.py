"""MMLU and WinoGrande as training tasks, worded exactly as lm-evaluation-harness evaluates them.

Both are multiple choice: a candidate is a context and a continuation, and an answer is the candidate whose
continuation has the greatest summed log-probability. Training takes the correct candidate alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cache_store.errors import ConfigError, DataError
from cache_store.suggest import did_you_mean
from workers.data.text.corpora.base import Corpus, Record, broken
from workers.data.text.corpora.columns import missing_column
from workers.data.text.corpora.files import Folder, open_folder
from workers.data.text.corpora.running_text import decoded
from workers.seeds import derive_seed
from workers.specs.language import TextSpec

_LETTERS = "ABCD"
_WINOGRANDE_SIZES = ("xl", "l", "m", "s", "xs")


class Candidate(NamedTuple):
    """Only `continuation` is scored, given `context`."""

    context: str
    continuation: str


class Question(NamedTuple):
    """Its candidates, and which of them is right. Without the examples before it: see `with_shots`."""

    candidates: tuple[Candidate, ...]
    correct: int

    def shown(self) -> str:
        """Word it as an example for another question, with its answer."""
        right = self.candidates[self.correct]
        return right.context + right.continuation + "\n\n"

    def with_shots(self, before: str) -> Question:
        """Return the same question after `before`."""
        return Question(tuple(Candidate(before + c.context, c.continuation) for c in self.candidates), self.correct)


class MMLU(Corpus):
    """MMLU's test questions, split into train, validation and test by the seed (its files have no training set), each
    after a line about the subject and the first `shots` of the subject's dev questions, which are never trained on.

    `subset` takes one subject. Files as published (no header, answers A to D) or with a header and answers 0 to 3.
    """

    def __init__(self, data: TextSpec) -> None:
        allowed = "a folder holding dev/<subject>_dev.csv and test/<subject>_test.csv"
        self._folder = open_folder(data, allowed)
        self._shots = data.shots
        digest = hashlib.sha256(b"mmlu")
        subjects = _subjects(self._folder, "test")
        if data.subset is not None:
            if data.subset not in subjects:
                raise _no_subset(data, subjects)
            subjects = {data.subset: subjects[data.subset]}
        if not subjects:
            raise DataError(f"data.path: no questions at {data.path}; allowed: {allowed}")
        examples = _subjects(self._folder, "dev") if data.shots else {}
        problems = [
            f"data.path: {self._folder.root} has no dev/{name}_dev.csv"
            for name in subjects
            if data.shots and name not in examples
        ]
        if problems:
            raise DataError("\n".join(problems), problems=problems)
        self._questions: list[Record] = []
        self._before: list[str] = []
        size = 0
        for subject, path in subjects.items():
            before = (
                f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
            )
            for name in [examples[subject], path] if data.shots else [path]:
                content = self._folder.read(name)
                digest.update(f"\x1e{subject}\x1f{len(content)}\x1f".encode())
                digest.update(content)
                rows = _mmlu_rows(content, name)
                if name == path:
                    self._questions += rows
                    self._before += [before] * len(rows)
                    size += len(content) + len(rows) * len(before.encode())
                elif len(rows) < data.shots:
                    raise ConfigError(f"data.shots: {data.shots}: {name} has {len(rows)}; allowed: 0 to {len(rows)}")
                else:
                    before += "".join(record.value.shown() for record in rows[: data.shots])
        self.fingerprint = digest.hexdigest()
        self.documents = {"train": len(self._questions)}
        self.bytes = {"train": size}
        if not self._questions:
            raise DataError(f"data.path: the files of {data.path} hold no questions")

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`: values are questions, with the examples before them."""
        for number in np.flatnonzero(wanted).tolist():
            record = self._questions[number]
            yield number, record._replace(value=record.value.with_shots(self._before[number]))


def _subjects(folder: Folder, split: str) -> dict[str, str]:
    """Path of every subject's file of a split, by subject."""
    try:
        paths = sorted(map(str, folder.filesystem.ls(f"{folder.root.rstrip('/')}/{split}", detail=False)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"data.path: cannot list {folder.root}/{split}: {error}") from error
    matches = ((re.search(rf"([^/]+)_{split}\.csv$", path), path) for path in paths)
    return {match.group(1): path for match, path in matches if match}


def _no_subset(data: TextSpec, allowed: Any) -> DataError:
    hint = did_you_mean(str(data.subset), allowed)
    return DataError(f"data.subset: {data.path} has no {data.subset!r}{hint} (it has {', '.join(allowed)})")


def _mmlu_rows(content: bytes, path: str) -> list[Record]:
    try:
        rows = list(csv.reader(io.StringIO(decoded(content, path), newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is no CSV file: {error}", file=path) from error
    if rows and rows[0][:1] == ["question"] and rows[0][-1] == "answer":
        rows = rows[1:]
    return [Record(_mmlu_question(row, Record(None, path, number)), path, number) for number, row in enumerate(rows)]


def _mmlu_question(row: list[str], place: Record) -> Question:
    if len(row) != 6:
        raise broken(place, f"{len(row)} columns; allowed: question, four choices, answer")
    question, *choices, answer = row
    correct = _LETTERS.find(answer) if answer in tuple(_LETTERS) else int(answer) if answer in tuple("0123") else -1
    if correct < 0:
        raise broken(place, f"the answer is {answer!r}; allowed: 0 to 3, or A to D")
    lines = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))
    context = f"{question.strip()}{lines}\nAnswer:"
    return Question(tuple(Candidate(context, f" {letter}") for letter in _LETTERS), correct)


class WinoGrande(Corpus):
    """WinoGrande by partial evaluation: the sentence up to the blank with an option in it is the context, and what
    follows the blank is scored. `subset` is the size of the training file (the largest there is by default);
    validation is held out of it, and the published dev file is the test split. Examples before a question are drawn
    from the questions that are trained on, by the seed.
    """

    def __init__(self, data: TextSpec) -> None:
        allowed = "a folder holding train_<size>.jsonl (xl, l, m, s or xs) and dev.jsonl"
        folder = open_folder(data, allowed)
        present = [size for size in _WINOGRANDE_SIZES if folder.filesystem.isfile(f"{folder.root}/train_{size}.jsonl")]
        if not present:
            raise DataError(f"data.path: no training file at {data.path}; allowed: {allowed}")
        if data.subset is not None and data.subset not in present:
            raise _no_subset(data, present)
        paths = {"train": f"{folder.root}/train_{data.subset or present[0]}.jsonl", "test": f"{folder.root}/dev.jsonl"}
        digest = hashlib.sha256(b"winogrande")
        self._questions: dict[str, list[Record]] = {}
        self.bytes: dict[str, int] = {}
        for split, path in paths.items():
            content = folder.read(path)
            digest.update(f"\x1e{split}\x1f{len(content)}\x1f".encode())
            digest.update(content)
            self._questions[split] = _winogrande_rows(content, path)
            self.bytes[split] = len(content)
            if not self._questions[split]:
                raise DataError(f"data.path: {path} holds no questions", file=path)
        self.fingerprint = digest.hexdigest()
        self.documents = {split: len(questions) for split, questions in self._questions.items()}
        self._shots = data.shots
        self._pool: list[int] = []
        self._seed = 0

    def draw_shots(self, trained: np.ndarray, seed: int) -> None:
        """See `Corpus`: examples are questions of the training file."""
        if self._shots and len(trained) <= self._shots:
            raise ConfigError(f"data.shots: {self._shots}: there are {len(trained)} training questions to draw from")
        self._pool = trained.tolist()
        self._seed = seed

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`: values are questions, with the examples before them."""
        for number in np.flatnonzero(wanted).tolist():
            record = self._questions[split][number]
            before = "".join(self._questions["train"][shot].value.shown() for shot in self._drawn(split, number))
            yield number, record._replace(value=record.value.with_shots(before))

    def _drawn(self, split: str, number: int) -> list[int]:
        """Different training questions, never this one: a function of seed, split and number."""
        if not self._shots:
            return []
        draws = np.random.Philox(key=derive_seed(self._seed, "shots", split, number))
        chosen: list[int] = []
        while len(chosen) < self._shots:
            shot = self._pool[int(draws.random_raw()) % len(self._pool)]
            if shot not in chosen and not (split == "train" and shot == number):
                chosen.append(shot)
        return chosen


def _winogrande_rows(content: bytes, path: str) -> list[Record]:
    lines = [line for line in decoded(content, path).split("\n") if line.strip()]
    return [Record(_winogrande_question(line, Record(None, path, row)), path, row) for row, line in enumerate(lines)]


def _winogrande_question(line: str, place: Record) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise broken(place, f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise broken(place, f"a {type(record).__name__} instead of a JSON object")
    for column in ("sentence", "option1", "option2", "answer"):
        if column not in record:
            raise missing_column(f"row {place.row} of {place.file}", column, record)
        if not isinstance(record[column], str):
            raise broken(place, f"{column} is {record[column]!r}; allowed: a text")
    if record["answer"] not in ("1", "2"):
        raise broken(place, f"the answer is {record['answer']!r}; allowed: '1' or '2'")
    before, blank, after = record["sentence"].partition("_")
    if not blank:
        raise broken(place, "the sentence has no '_' to fill in")
    options = (record["option1"], record["option2"])
    return Question(
        tuple(Candidate(before + option, f" {after.strip()}") for option in options), int(record["answer"]) - 1
    )
