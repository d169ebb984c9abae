"""See what a benchmark will ask, from its local files alone: imports neither the harness nor torch, so plans can."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_store.errors import DataError, UserError
from workers.judge import local_data, problems

#: Characters of a token, about.
_CHARACTERS = 4


@dataclass(frozen=True)
class Outlook:
    """`files`: all that is read. `requests`: sequences that go through the model; `tokens`: theirs, about, with those
    that are generated."""

    files: tuple[Path, ...] = ()
    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What an outlook depends on; see `workers.judge.judges.JudgeSettings`."""

    data: Path
    shots: int = 0
    limit: int | None = None
    subjects: tuple[str, ...] | None = None
    max_new_tokens: int = 0


def mmlu(asking: Asking) -> Outlook:
    """A request a choice: four a question. UserError without the harness, DataError for missing or malformed files."""
    _demand_harness()
    folder = asking.data / "mmlu"
    there = sorted(path.name.removesuffix("_test.csv") for path in folder.glob("test/*_test.csv"))
    if not there:
        raise DataError(f"{folder}: holds no test/<subject>_test.csv")
    unknown = sorted(set(asking.subjects or ()) - set(there))
    if unknown:
        raise DataError(f"{folder}: has no files of {', '.join(unknown)}; it has those of {', '.join(there)}")
    subjects = sorted(set(asking.subjects or there))
    requests, characters = 0, 0
    for subject in subjects:
        rows = local_data.mmlu(folder, subject)
        questions = rows["test"][: asking.limit]
        _demand_examples(folder / "dev" / f"{subject}_dev.csv", rows["dev"], asking.shots)
        examples = asking.shots * _mean_length(rows["dev"])
        requests += 4 * len(questions)
        characters += 4 * (len(questions) * examples + sum(map(_length, questions)))
    files = [folder / split / f"{subject}_{split}.csv" for split in ("dev", "test") for subject in subjects]
    return Outlook(tuple(files), requests, characters // _CHARACTERS)


def winogrande(asking: Asking) -> Outlook:
    """A request an option: two a sentence. The errors are those of `mmlu`."""
    _demand_harness()
    folder = asking.data / "winogrande"
    rows, examples_from = local_data.winogrande(folder)
    questions = rows["validation"][: asking.limit]
    _demand_examples(folder / examples_from, rows["train"], asking.shots)
    examples = asking.shots * _mean_length(rows["train"])
    characters = 2 * (len(questions) * examples + sum(map(_length, questions)))
    return Outlook((folder / examples_from, folder / "dev.jsonl"), 2 * len(questions), characters // _CHARACTERS)


def code(task: str, asking: Asking) -> Outlook:
    """A completion a problem. DataError for a missing or malformed file."""
    file = problems.find_file(asking.data, task)
    asked = problems.read_problems(file)[: asking.limit]
    prompts = sum(len(problem.prompt) for problem in asked) // _CHARACTERS
    return Outlook((file,), len(asked), prompts + len(asked) * asking.max_new_tokens)


def _demand_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("judging by MMLU and WinoGrande needs lm-evaluation-harness: pip install segprop[eval]")


def _demand_examples(file: Path, rows: local_data.QuestionRows, shots: int) -> None:
    """DataError where there are too few to stand before a question; the harness takes each once."""
    different = len({tuple(_texts(row.values())) for row in rows})
    if different < shots:
        raise DataError(
            f"{file}: has {different} different examples, and {shots} are to stand before a question (shots)"
        )


def _length(row: Mapping[str, Any]) -> int:
    return sum(len(text) for text in _texts(value for key, value in row.items() if key not in ("subject", "answer")))


def _texts(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, list):
            yield from value
        elif isinstance(value, str):
            yield value


def _mean_length(rows: local_data.QuestionRows) -> int:
    return sum(map(_length, rows)) // max(1, len(rows))
