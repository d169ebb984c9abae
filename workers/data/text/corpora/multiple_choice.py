"""MMLU and WinoGrande as training tasks, worded exactly as lm-evaluation-harness evaluates them.

Both are multiple choice: a candidate is a context and a continuation, and an answer is the candidate whose
continuation has the greatest summed log-probability. Training takes the correct candidate alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cache_store.errors import ConfigError, DataError
from workers.data.text.corpora.base import Corpus, Record, broken
from workers.data.text.corpora.files import Folder, decoded, open_folder
from workers.data.text.corpora.mmlu_files import TRAINING, MMLUFiles
from workers.data.text.corpora.questions import Candidate, Question, no_subset
from workers.data.text.corpora.rows.columns import missing_column
from workers.seeds import derive_seed
from workers.specs.language import TextSpec

_WINOGRANDE_SIZES = ("xl", "l", "m", "s", "xs")
_MMLU_FILES = (
    "a folder holding auxiliary_train/*.csv, dev/<subject>_dev.csv, val/<subject>_val.csv (may be missing) and "
    "test/<subject>_test.csv, as published, or Parquet as cais/mmlu on the hub has it: auxiliary_train/train-*.parquet "
    "(or all/auxiliary_train-*.parquet) and all/ or <subject>/ with dev-*, validation-* and test-*.parquet"
)
_MMLU_SOURCE = (
    "it is in https://people.eecs.berkeley.edu/~hendrycks/data.tar (folder auxiliary_train), and on the hub in "
    "cais/mmlu (configuration auxiliary_train)"
)
_MMLU_HELD_OUT = "there is no val: validation is held out of auxiliary_train by the seed"


class MMLU(Corpus):
    """MMLU in its published splits: auxiliary_train is trained on, val is validation (held out of auxiliary_train where
    there is none), and test is for judging alone.

    A question comes after a line about its subject and the first `shots` of the subject's dev questions, which are
    never trained on. Questions of auxiliary_train have no subject: their line names none, and the examples before
    them are those of the subjects in turn. `subset` takes one subject; auxiliary_train stays whole.
    """

    def __init__(self, data: TextSpec) -> None:
        folder = open_folder(data, _MMLU_FILES)
        files = MMLUFiles(folder)
        subjects = files.subjects("test")
        if not subjects:
            raise DataError(f"data.path: no test questions at {data.path}; allowed: {_MMLU_FILES}")
        if data.subset is not None and data.subset not in subjects:
            raise no_subset(data, subjects)
        subjects = subjects if data.subset is None else [data.subset]
        training = files.training()
        if not training:
            raise DataError(
                f"data.path: {data.path} has no {TRAINING}, which MMLU is trained on (its test questions are for "
                f"judging alone); {_MMLU_SOURCE}; allowed: {_MMLU_FILES}"
            )
        parts = {split: files.questions(split, subjects) for split in ("val", "test")}
        _demand_subjects(folder, parts["val"], subjects, "val")
        examples = _mmlu_examples(folder, files, subjects, data.shots)
        self.fingerprint = files.fingerprint
        self.notes = () if parts["val"] else (_MMLU_HELD_OUT,)
        #: By split: records with what stands before each.
        self._questions: dict[str, list[tuple[Record, str]]] = {"train": _in_turn(training, list(examples.values()))}
        for split, own in (("validation", "val"), ("test", "test")):
            asked = [
                (record, _about(subject) + examples[subject])
                for subject, found in parts[own].items()
                for record in found
            ]
            if asked:
                self._questions[split] = asked
        if "test" not in self._questions:
            raise DataError(f"data.path: the test files of {data.path} hold no questions")
        self.documents = {split: len(questions) for split, questions in self._questions.items()}
        self.bytes = {
            split: sum(len(before) + len(record.value.shown()) for record, before in questions)
            for split, questions in self._questions.items()
        }

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`: values are questions, with the examples before them."""
        for number in np.flatnonzero(wanted).tolist():
            record, before = self._questions[split][number]
            yield number, record._replace(value=record.value.with_shots(before))


def _about(subject: str | None) -> str:
    about = "" if subject is None else f" about {subject.replace('_', ' ')}"
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def _in_turn(training: list[Record], examples: list[str]) -> list[tuple[Record, str]]:
    befores = [_about(None) + shown for shown in examples]
    return [(record, befores[number % len(befores)]) for number, record in enumerate(training)]


def _mmlu_examples(folder: Folder, files: MMLUFiles, subjects: list[str], shots: int) -> dict[str, str]:
    """Word the examples of every subject."""
    if not shots:
        return dict.fromkeys(subjects, "")
    found = files.questions("dev", subjects)
    _demand_subjects(folder, found, subjects, "dev", needed=True)
    for records in found.values():
        if len(records) < shots:
            where = records[0].file if records else f"{folder.root} (dev)"
            raise ConfigError(f"data.shots: {shots}: {where} has {len(records)}; allowed: 0 to {len(records)}")
    return {subject: "".join(record.value.shown() for record in records[:shots]) for subject, records in found.items()}


def _demand_subjects(
    folder: Folder, found: Mapping[str, Any], subjects: list[str], split: str, *, needed: bool = False
) -> None:
    """Raise DataError, all at once, for subjects without questions in a split that others have (or that is needed)."""
    problems = [
        f"data.path: {folder.root} has no {split}/{subject}_{split}.csv (nor the Parquet file of it)"
        for subject in subjects
        if subject not in found
    ]
    if problems and (found or needed):
        raise DataError("\n".join(problems), problems=problems)


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
            raise no_subset(data, present)
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
    candidates = tuple(Candidate(before + option, f" {after.strip()}") for option in options)
    return Question(candidates, int(record["answer"]) - 1, "\n".join((record["sentence"], *options)))
