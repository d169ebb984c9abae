"""What a benchmark will ask, seen from its files alone, and its files kept as one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cache_store.errors import CorruptShard, DataError
from workers.judge import outlook
from workers.judge.judges import JUDGES, JudgeSettings
from workers.judge.outlook import Asking
from workers.judge.question_files import fingerprint, pack, unpack

PROBLEM = {"task_id": "T/0", "prompt": "def two():\n", "entry_point": "two", "canonical_solution": "", "test": ""}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two subjects of three questions, four sentences, one problem."""
    root = tmp_path / "data"
    for folder in ("mmlu/dev", "mmlu/test", "winogrande", "humaneval"):
        (root / folder).mkdir(parents=True)
    for subject in ("anatomy", "law"):
        for split in ("dev", "test"):
            rows = "question,choice0,choice1,choice2,choice3,answer\n" + 3 * f"{30 * 'q'},a,b,c,d,1\n"
            (root / "mmlu" / split / f"{subject}_{split}.csv").write_text(rows)
    sentence = json.dumps({"sentence": "The _ is wet.", "option1": "sea", "option2": "sun", "answer": "1"}) + "\n"
    for name in ("train_xs", "train_s", "dev"):
        (root / "winogrande" / f"{name}.jsonl").write_text(4 * sentence)
    (root / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    return root


def names(data: Path, seen: outlook.Outlook) -> list[str]:
    return [file.relative_to(data).as_posix() for file in seen.files]


def test_an_outlook_counts_requests_and_names_every_file(data: Path) -> None:
    law = JUDGES["mmlu"].outlook(Asking(data=data, subjects=("law",), limit=2, shots=1))
    assert names(data, law) == ["mmlu/dev/law_dev.csv", "mmlu/test/law_test.csv"]
    # 4 choices of 2 questions: 34 characters and those of an example, 4 a token.
    assert (law.requests, law.tokens) == (8, 8 * 2 * 34 // 4)
    assert JUDGES["mmlu"].outlook(Asking(data=data)).requests == 24
    sentences = JUDGES["winogrande"].outlook(Asking(data=data))
    # Examples come from the largest training file there is.
    assert names(data, sentences) == ["winogrande/train_s.jsonl", "winogrande/dev.jsonl"]
    assert sentences.requests == 8
    code = JUDGES["humaneval"].outlook(Asking(data=data, max_new_tokens=100))
    assert (names(data, code), code.requests, code.tokens) == (["humaneval/HumanEval.jsonl"], 1, 102)


def test_files_that_are_missing_or_malformed_are_named(data: Path) -> None:
    (data / "mmlu" / "dev" / "law_dev.csv").unlink()
    with pytest.raises(DataError, match=r"law_dev\.csv: cannot be read"):
        JUDGES["mmlu"].outlook(Asking(data=data))
    (data / "winogrande" / "dev.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"dev\.jsonl"):
        JUDGES["winogrande"].outlook(Asking(data=data))


def test_kept_files_are_the_same_bytes_wherever_and_whenever_they_were_written(data: Path, tmp_path: Path) -> None:
    files = JUDGES["mmlu"].outlook(Asking(data=data)).files
    packed, known = pack(data, files), fingerprint(data, files)
    unpack(packed, tmp_path / "there")
    again = [tmp_path / "there" / file.relative_to(data) for file in files]
    for file in again:
        os.utime(file, (1_000_000_000, 1_000_000_000))
    assert pack(tmp_path / "there", reversed(again)) == packed
    assert fingerprint(tmp_path / "there", again) == known
    again[0].write_text(again[0].read_text().replace(",1", ",2"))
    assert fingerprint(tmp_path / "there", again) != known


def test_what_holds_no_questions_is_no_crash(tmp_path: Path) -> None:
    with pytest.raises(CorruptShard, match="holds no questions"):
        unpack(b"PK no", tmp_path)


def test_every_setting_that_decides_a_score_is_one_of_the_judge() -> None:
    assert {name for row in JUDGES.values() for name in row.uses} <= set(JudgeSettings.__dataclass_fields__)
    assert all(row.title for row in JUDGES.values())
