"""Which questions a run trains on, as its data's digests know them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from text_makers import mmlu_folder, write_lines

from workers.data.text.corpora.multiple_choice import MMLU, WinoGrande
from workers.data.text.splits import split_documents
from workers.data.text.trained import trained_questions
from workers.specs.language import TextSpec


def test_the_digests_are_those_of_the_questions_trained_on_and_no_others(tmp_path: Path) -> None:
    root = mmlu_folder(tmp_path, validation=0, training=40)
    data = TextSpec(name="mmlu", path=root, validation=8, train_limit=20, shots=2)
    found = trained_questions(data, 5)
    assert found is not None
    corpus = MMLU(data)
    trained = set(split_documents(data, 5, corpus.documents)["train"][1].tolist())
    assert len(trained) == len(found.texts) == 20
    for number, record in corpus.records("train", np.ones(40, bool)):
        assert found.likeness(record.value.asked) == ("same" if number in trained else None)
    for _, record in corpus.records("test", np.ones(18, bool)):
        assert found.likeness(record.value.asked) is None
    with (tmp_path / "dev" / "anatomy_dev.csv").open(newline="") as file:
        assert all(found.likeness("\n".join(row[:5])) is None for row in csv.reader(file))


def test_questions_are_known_as_they_were_published_whatever_stands_before_them(tmp_path: Path) -> None:
    lines = [{"sentence": f"In {i} _ won.", "option1": "Ann", "option2": "Bob", "answer": "1"} for i in range(30)]
    write_lines(tmp_path / "train_xs.jsonl", lines[:20])
    write_lines(tmp_path / "dev.jsonl", lines[20:])
    data = TextSpec(name="winogrande", path=str(tmp_path), validation=5, shots=3)
    found = trained_questions(data, 0)
    assert found is not None
    trained = set(split_documents(data, 0, WinoGrande(data).documents)["train"][1].tolist())
    for number, line in enumerate(lines):
        asked = "\n".join((line["sentence"], line["option1"], line["option2"]))
        assert found.likeness(asked) == ("same" if number in trained else None)


def test_text_has_no_questions(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert trained_questions(TextSpec(name="text", path=str(tmp_path)), 0) is None
