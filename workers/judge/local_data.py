"""Read MMLU and WinoGrande from local files, as rows of the very columns that the hub's data sets have.

Layout: `mmlu/dev/<subject>_dev.csv` and `mmlu/test/<subject>_test.csv` with the columns question, choice0 … choice3
and answer (0-3); `winogrande/train_<size>.jsonl` and `winogrande/dev.jsonl` with sentence, option1, option2, answer.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cache_store.errors import DataError

QuestionRows = list[dict[str, Any]]
_CHOICES = ("choice0", "choice1", "choice2", "choice3")
_MMLU = ("question", *_CHOICES, "answer")
_WINOGRANDE = ("sentence", "option1", "option2", "answer")
#: Largest first: the hub's task draws its examples from xl.
_SIZES = ("xl", "l", "m", "s", "xs")


def mmlu(folder: Path, subject: str) -> dict[str, QuestionRows]:
    """Return `{"dev": …, "test": …}` of one subject; DataError names the file and line that is missing or wrong."""
    return {split: list(_mmlu(folder / split / f"{subject}_{split}.csv", subject)) for split in ("dev", "test")}


def winogrande(folder: Path) -> tuple[dict[str, QuestionRows], str]:
    """Return `{"train": …, "validation": …}`, and the name of the file that train was read from."""
    train = next((path for size in _SIZES if (path := folder / f"train_{size}.jsonl").is_file()), None)
    if train is None:
        raise DataError(f"{folder}: none of {', '.join(f'train_{size}.jsonl' for size in _SIZES)} is there")
    return {"train": list(_winogrande(train)), "validation": list(_winogrande(folder / "dev.jsonl"))}, train.name


def _mmlu(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        reader = csv.DictReader(file)
        _demand_columns(path, reader.fieldnames or (), _MMLU)
        for row in reader:
            if None in row or None in row.values() or row["answer"] not in ("0", "1", "2", "3"):
                raise DataError(f"{path}:{reader.line_num}: must be a question, four choices and an answer from 0 to 3")
            yield {
                "question": row["question"],
                "subject": subject,
                "choices": [row[key] for key in _CHOICES],
                "answer": int(row["answer"]),
            }


def _winogrande(path: Path) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                _demand_columns(path, row, _WINOGRANDE)
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
            if "_" not in row["sentence"] or row["answer"] not in ("1", "2"):
                raise DataError(f"{path}:{number}: must have a sentence with _ in it and an answer of 1 or 2")
            yield {key: row[key] for key in _WINOGRANDE}


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _demand_columns(path: Path, found: Sequence[str] | dict[str, Any], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        raise DataError(f"{path}: has no {', '.join(missing)}; needed are {', '.join(needed)}")
