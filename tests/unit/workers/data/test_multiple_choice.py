"""MMLU and WinoGrande as training tasks, worded and split into tokens as lm-evaluation-harness does it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_makers import (
    BYTES,
    mmlu_folder,
    mmlu_training,
    samples_of,
    shared,
    source_of,
    spec_of,
    store,
    word_tokenizer,
    write_lines,
)

from cache_store.errors import ConfigError, DataError
from workers.data.text import prepare
from workers.data.text.corpora.multiple_choice import MMLU, WinoGrande
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.splits import split_documents
from workers.domains.text.planning import TEXT
from workers.specs.language import TextSpec

WINO = [
    ("Sarah was a better surgeon than Maria so _ got the easy cases.", "Sarah", "Maria", "2"),
    ("_ liked tea, Bob did not.", "Ann", "Bob", "1"),
    ("The wine would ruin the bed and the rug, but the _ was fine.", "rug", "bed ", "2"),
]


def wino_folder(root: Path, train: int = 30) -> str:
    def records(count: int, name: str) -> list[dict[str, str]]:
        found = []
        for i in range(count):
            sentence, one, two, answer = WINO[i % 3]
            found.append({"sentence": f"{name}{i}: {sentence}", "option1": one, "option2": two, "answer": answer})
        return found

    write_lines(root / "train_s.jsonl", records(train, "s"))
    write_lines(root / "train_xs.jsonl", records(12, "xs"))
    write_lines(root / "dev.jsonl", records(5, "dev"))
    return str(root)


def everything(corpus: Any, split: str) -> list[Any]:
    wanted = np.ones(corpus.documents[split], bool)
    return [record.value for _, record in corpus.records(split, wanted)]


def harness(path: str, rows: Mapping[str, list[dict[str, Any]]]) -> Any:
    """lm-evaluation-harness's own task, by its YAML file, over these rows."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval, to compare with the harness itself")
    datasets = pytest.importorskip("datasets", reason="needs datasets, which lm-eval reads through")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = dict(load_yaml(os.path.join(os.path.dirname(lm_eval.__file__), "tasks", path)))
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(members) for split, members in rows.items()})
    config.update(custom_dataset=lambda **_: made, metadata={})
    return ConfigurableTask(config=config)


def requests(task: Any, doc: Any, shots: int) -> list[tuple[str, str]]:
    context = task.fewshot_context(doc, num_fewshot=shots)
    return [request.args for request in task.construct_requests(doc, context, metadata=("", 0, 1))]


def mmlu_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    return [{"question": r[0], "choices": r[1:5], "answer": int(r[5])} for r in rows]


@pytest.mark.parametrize("subject", ["anatomy", "high_school_european_history"])
@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_is_worded_as_lm_evaluation_harness_does(tmp_path: Path, subject: str, shots: int) -> None:
    root = shared("mmlu")
    for split in ("dev", "test"):
        (tmp_path / split).symlink_to(Path(root) / split)
    mmlu_training(tmp_path)
    rows = {split: mmlu_rows(Path(root) / split / f"{subject}_{split}.csv") for split in ("dev", "test")}
    task = harness(f"mmlu/default/mmlu_{subject}.yaml", rows)
    mine = everything(MMLU(TextSpec(name="mmlu", path=str(tmp_path), subset=subject, shots=shots)), "test")
    docs = list(task.test_docs())
    assert len(mine) == len(docs) > 90
    for question, doc in zip(mine, docs, strict=True):
        assert [tuple(candidate) for candidate in question.candidates] == requests(task, doc, shots)
        assert question.correct == doc["answer"]


def test_winogrande_is_worded_as_lm_evaluation_harness_does() -> None:
    root = shared("winogrande")
    corpus = WinoGrande(TextSpec(name="winogrande", path=root, subset="xs"))
    lines = [json.loads(line) for line in (Path(root) / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    task = harness("winogrande/default.yaml", {"train": lines[:3], "validation": lines})
    mine = everything(corpus, "test")
    assert len(mine) == len(lines) == 1267
    for question, doc in zip(mine, task.validation_docs(), strict=True):
        assert [tuple(candidate) for candidate in question.candidates] == requests(task, doc, 0)
        assert question.correct == task.doc_to_text(doc)


def test_winogrande_examples_are_worded_as_lm_evaluation_harness_does(tmp_path: Path) -> None:
    corpus = WinoGrande(TextSpec(name="winogrande", path=wino_folder(tmp_path), subset="s", shots=1))
    lines = [json.loads(line) for line in (tmp_path / "train_s.jsonl").read_text(encoding="utf-8").splitlines()]
    dev = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus.draw_shots(np.array([4, 17]), 0)
    either = [harness("winogrande/default.yaml", {"train": [lines[i]] * 3, "validation": dev}) for i in (4, 17)]
    for question, doc in zip(everything(corpus, "test"), dev, strict=True):
        assert [tuple(c) for c in question.candidates] in [requests(task, doc, 1) for task in either]


def test_examples_of_winogrande_are_trained_on_differ_and_are_never_the_question_itself(tmp_path: Path) -> None:
    data = TextSpec(name="winogrande", path=wino_folder(tmp_path), subset="s", shots=3, validation=10)
    corpus = WinoGrande(data)
    trained = split_documents(data, 0, corpus.documents)["train"][1]
    corpus.draw_shots(trained, 0)
    drawn = {(split, i): corpus._drawn(split, i) for split, n in corpus.documents.items() for i in range(n)}
    assert all(len(set(shots)) == 3 and set(shots) <= set(trained.tolist()) for shots in drawn.values())
    assert not any(i in shots for (split, i), shots in drawn.items() if split == "train")
    assert len(set(map(tuple, drawn.values()))) > 20
    corpus.draw_shots(trained, 1)
    assert corpus._drawn("test", 0) != drawn["test", 0]
    with pytest.raises(ConfigError, match=r"data\.shots: 3: there are 3 training questions"):
        corpus.draw_shots(trained[:3], 0)


def test_continuations_are_cut_from_the_context_as_lm_evaluation_harness_does(tmp_path: Path) -> None:
    """By the harness's own `_encode_pair`, with a tokenizer that puts a first token before every text."""
    lm = pytest.importorskip("lm_eval.api.model", reason="needs lm-eval, to compare with the harness itself")
    tokenizer = word_tokenizer(tmp_path / "tokenizer", bos=True)

    class Pairs(lm.TemplateLM):  # type: ignore[misc, name-defined]
        backend = "causal"
        eot_token_id = 0
        loglikelihood_rolling = generate_until = _loglikelihood_tokens = None

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            ids: list[int] = tokenizer(string)["input_ids"]
            return ids

    Pairs.__abstractmethods__ = frozenset()
    data = TextSpec(name="winogrande", path=wino_folder(tmp_path / "wino"), subset="s", validation=2)
    source = source_of(data, spec_of(tmp_path / "tokenizer"), "test")
    questions = everything(WinoGrande(data), "test")
    expected = []
    for question in questions:
        for context, continuation in question.candidates:
            before, after = Pairs()._encode_pair(context, continuation)
            expected.append((before + after, list(range(len(before), len(before) + len(after)))))
    assert [(ids, counted) for ids, _, counted in samples_of(source)] == expected
    assert expected[0][0][0] == tokenizer.bos_token_id


def test_train_holds_the_right_candidate_and_evaluation_all_of_them_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_BATCH_DOCUMENTS", 3)
    data = TextSpec(name="mmlu", path=mmlu_folder(tmp_path, validation=2), shots=2, sequence_length=900)
    assert inspect_text(data).documents == {"train": 12, "validation": 4, "test": 18}
    assert inspect_text(data).rows == {"train": 12, "validation": 16, "test": 72}
    snapshots = store()
    result = prepare_text(data, BYTES, 0, snapshots)
    assert result.rows == {"train": 12, "validation": 16, "test": 72}
    corpus = MMLU(data)
    questions = {split: everything(corpus, split) for split in ("train", "validation")}
    parts = split_documents(data, 0, corpus.documents)
    train = source_of(data, BYTES, "train", snapshots, 0, result)
    assert train.groups is None
    for (ids, _, counted), number in zip(samples_of(train), parts["train"][1], strict=True):
        right = questions["train"][number].candidates[questions["train"][number].correct]
        assert bytes(ids).decode() == right.context + right.continuation
        assert counted == [len(ids) - 2, len(ids) - 1]
    validation = source_of(data, BYTES, "validation", snapshots, 0, result)
    assert validation.groups is not None
    group, correct = validation.groups
    assert (group.dtype, correct.dtype) == (np.int64, np.bool_)
    assert group.tolist() == [i // 4 for i in range(16)]
    texts = [bytes(ids).decode() for ids, _, _ in samples_of(validation)]
    expected = [questions["validation"][number] for number in parts["validation"][1]]
    assert texts == [c.context + c.continuation for question in expected for c in question.candidates]
    assert np.flatnonzero(correct).tolist() == [4 * i + question.correct for i, question in enumerate(expected)]


def test_mmlu_has_the_subjects_line_and_its_own_dev_questions_before_every_question(tmp_path: Path) -> None:
    corpus = MMLU(TextSpec(name="mmlu", path=mmlu_folder(tmp_path), shots=1))
    (first,) = everything(corpus, "test")[9:10]
    assert first.candidates[2] == (
        "The following are multiple choice questions (with answers) about high school art.\n\n"
        'high_school_art dev 0,\n"why"?\nA. c00\nB. c01\nC. c02\nD. c03\nAnswer: A\n\n'
        'high_school_art test 0,\n"why"?\nA. c00\nB. c01\nC. c02\nD. c03\nAnswer:',
        " C",
    )
    # Questions of auxiliary_train have no subject: none is named, and every subject's examples have their turn.
    for number, subject in ((0, "anatomy"), (1, "high_school_art"), (2, "anatomy")):
        assert everything(corpus, "train")[number].candidates[2].context == (
            "The following are multiple choice questions (with answers).\n\n"
            f'{subject} dev 0,\n"why"?\nA. c00\nB. c01\nC. c02\nD. c03\nAnswer: A\n\n'
            f'training {number},\n"why"?\nA. c{number}0\nB. c{number}1\nC. c{number}2\nD. c{number}3\nAnswer:'
        )


def test_a_question_that_is_too_long_loses_its_beginning_and_keeps_its_answer(tmp_path: Path) -> None:
    data = TextSpec(name="mmlu", path=mmlu_folder(tmp_path, validation=2), sequence_length=40)
    with pytest.raises(DataError, match=r"data\.sequence_length: \d+ of \d+ samples \(100\.0 %\) are longer"):
        prepare_text(data, BYTES, 0, store())
    data, snapshots = replace(data, allow_loss=True), store()
    result = prepare_text(data, BYTES, 0, snapshots)
    statistics = result.statistics["validation"]
    assert (statistics.truncated, statistics.samples.max) == (16, 40)
    assert statistics.documents.min > 100
    for ids, positions, counted in samples_of(source_of(data, BYTES, "validation", snapshots, 0, result)):
        assert bytes(ids).decode()[:-1].endswith("\nAnswer: ")
        assert (positions, counted) == (list(range(40)), [38, 39])


def test_a_question_with_one_candidate_too_long_is_dropped_whole(tmp_path: Path) -> None:
    lines = [
        {"sentence": "_ b", "option1": "x" * (30 if i % 5 == 0 else 3), "option2": "y", "answer": "2"}
        for i in range(20)
    ]
    for name in ("train_xs", "dev"):
        write_lines(tmp_path / f"{name}.jsonl", lines)
    data = TextSpec(name="winogrande", path=str(tmp_path), validation=2, sequence_length=20, overlong="drop")
    snapshots = store()
    result = prepare_text(data, BYTES, 0, snapshots)
    assert result.statistics["test"].dropped == 8
    source = source_of(data, BYTES, "test", snapshots, 0, result)
    assert source.groups is not None
    assert source.groups[0].tolist() == [i // 2 for i in range(32)]
    refused = TextSpec(name="winogrande", path=str(tmp_path), validation=2, sequence_length=20, overlong="refuse")
    with pytest.raises(DataError, match=r"row 0 of .*dev\.jsonl: it takes 32 tokens; data\.sequence_length allows 20"):
        prepare_text(refused, BYTES, 0, store())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["q", "a", "b", "c", "1"], "row 9 of .*anatomy_test.csv: 5 columns"),
        (["q", "a", "b", "c", "d", "4"], "row 9 of .*anatomy_test.csv: the answer is '4'; allowed: 0 to 3, or A to D"),
        (["q", "a", "b", "c", "d", ""], "the answer is ''"),
    ],
)
def test_a_broken_mmlu_question_is_named(tmp_path: Path, row: list[str], message: str) -> None:
    mmlu_folder(tmp_path)
    with (tmp_path / "test" / "anatomy_test.csv").open("a", newline="") as stream:
        csv.writer(stream).writerow(row)
    with pytest.raises(DataError, match=message):
        inspect_text(TextSpec(name="mmlu", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "3"}, "the answer is '3'; allowed: '1' or '2'"),
        ({"answer": ""}, "the answer is ''"),
        ({"sentence": "no blank"}, "the sentence has no '_'"),
        ({"option1": 7}, "option1 is 7"),
    ],
)
def test_a_broken_winogrande_question_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    wino_folder(tmp_path)
    good = {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "1"}
    write_lines(tmp_path / "train_s.jsonl", [good, {**good, **change}])
    with pytest.raises(DataError, match=f"row 1 of .*train_s.jsonl: {message}"):
        inspect_text(TextSpec(name="winogrande", path=str(tmp_path)))
    write_lines(tmp_path / "train_s.jsonl", [{"sentence": "_", "option1": "", "opton2": "", "answer": "1"}])
    with pytest.raises(DataError, match="has no 'option2'; did you mean 'opton2'"):
        inspect_text(TextSpec(name="winogrande", path=str(tmp_path)))


def test_missing_files_subjects_sizes_and_examples_are_named(tmp_path: Path) -> None:
    root = mmlu_folder(tmp_path / "mmlu")
    with pytest.raises(DataError, match="has no 'anatmy'; did you mean 'anatomy'"):
        inspect_text(TextSpec(name="mmlu", path=root, subset="anatmy"))
    with pytest.raises(ConfigError, match=r"data.shots: 4: .*_dev.csv has 3; allowed: 0 to 3"):
        inspect_text(TextSpec(name="mmlu", path=root, shots=4))
    (tmp_path / "mmlu" / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(DataError, match=r"has no dev/anatomy_dev\.csv"):
        inspect_text(TextSpec(name="mmlu", path=root, shots=1))
    assert inspect_text(TextSpec(name="mmlu", path=root)).documents["test"] == 18
    wino = wino_folder(tmp_path / "wino")
    assert inspect_text(TextSpec(name="winogrande", path=wino)).documents == {"train": 28, "validation": 2, "test": 5}
    assert inspect_text(TextSpec(name="winogrande", path=wino, subset="xs")).documents["train"] == 11
    with pytest.raises(DataError, match=r"has no 'xl'.*\(it has s, xs\)"):
        inspect_text(TextSpec(name="winogrande", path=wino, subset="xl"))
    (tmp_path / "wino" / "dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"dev\.jsonl cannot be read"):
        inspect_text(TextSpec(name="winogrande", path=wino))


def test_mmlu_is_trained_on_auxiliary_train_alone_in_every_published_split(tmp_path: Path) -> None:
    data = TextSpec(name="mmlu", path=mmlu_folder(tmp_path), shots=2)
    corpus = MMLU(data)
    assert corpus.notes == ()
    assert corpus.documents == {"train": 12, "validation": 8, "test": 18}
    for split, own in (("train", "training"), ("validation", "val"), ("test", "test")):
        for question in everything(corpus, split):
            assert own in question.asked
    parts = split_documents(data, 3, corpus.documents)
    assert {split: own for split, (own, _) in parts.items()} == {split: split for split in parts}
    subject = MMLU(TextSpec(name="mmlu", path=str(tmp_path), subset="anatomy"))
    assert subject.documents == {"train": 12, "validation": 4, "test": 9}


def test_without_val_validation_is_held_out_of_auxiliary_train_and_said_so(tmp_path: Path) -> None:
    data = TextSpec(name="mmlu", path=mmlu_folder(tmp_path, validation=0), validation=3)
    outline = inspect_text(data)
    assert outline.documents == {"train": 9, "validation": 3, "test": 18}
    assert outline.notes == ("there is no val: validation is held out of auxiliary_train by the seed",)
    words = TEXT.words(data, outline, str)
    assert words.endswith("; there is no val: validation is held out of auxiliary_train by the seed")
    parts = split_documents(data, 0, MMLU(data).documents)
    assert {split: own for split, (own, _) in parts.items()} == {
        "train": "train",
        "validation": "train",
        "test": "test",
    }
    mmlu_folder(tmp_path, validation=4)
    (tmp_path / "val" / "anatomy_val.csv").unlink()
    with pytest.raises(DataError, match=r"has no val/anatomy_val\.csv"):
        MMLU(data)


def test_mmlu_without_auxiliary_train_is_refused_with_where_it_is_to_be_had() -> None:
    with pytest.raises(DataError) as refused:
        inspect_text(TextSpec(name="mmlu", path=shared("mmlu")))
    for words in (
        "has no auxiliary_train, which MMLU is trained on (its test questions are for judging alone)",
        "https://people.eecs.berkeley.edu/~hendrycks/data.tar",
        "cais/mmlu (configuration auxiliary_train)",
        "auxiliary_train/*.csv",
        "auxiliary_train/train-*.parquet",
    ):
        assert words in refused.value.message


@pytest.mark.parametrize("layout", ["by subject", "all"])
@pytest.mark.parametrize("shots", [0, 2])
def test_mmlu_reads_the_hubs_parquet_files_as_the_published_ones(tmp_path: Path, layout: str, shots: int) -> None:
    published = MMLU(TextSpec(name="mmlu", path=mmlu_folder(tmp_path / "csv"), shots=shots))
    hub_folder(tmp_path / "csv", tmp_path / "hub", layout)
    hub = MMLU(TextSpec(name="mmlu", path=str(tmp_path / "hub"), shots=shots))
    assert hub.documents == published.documents
    for split in ("train", "validation", "test"):
        assert everything(hub, split) == everything(published, split)
    assert hub.notes == ()


def hub_folder(source: Path, target: Path, layout: str) -> None:
    """Write the CSV files of `source` as cais/mmlu on the hub has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def rows(path: Path, subject: str) -> list[dict[str, Any]]:
        with path.open(newline="", encoding="utf-8") as stream:
            found = [row for row in csv.reader(stream) if row[0] != "question"]
        return [
            {"question": q, "subject": subject, "choices": choices, "answer": "ABCD0123".index(a) % 4}
            for q, *choices, a in found
        ]

    def write(path: str, found: list[dict[str, Any]]) -> None:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(found), target / path)

    training = [row for path in sorted((source / "auxiliary_train").iterdir()) for row in rows(path, "")]
    if layout == "all":
        write("all/auxiliary_train-00000-of-00001.parquet", training)
    else:
        # The hub's own quirk: the columns lie inside one.
        write("auxiliary_train/train-00000-of-00001.parquet", [{"train": row} for row in training])
    for name, split in (("dev", "dev"), ("val", "validation"), ("test", "test")):
        subjects = {path.stem.removesuffix(f"_{name}"): path for path in sorted((source / name).iterdir())}
        if layout == "all":
            write(f"all/{split}-00000-of-00001.parquet", [row for s, path in subjects.items() for row in rows(path, s)])
        else:
            for subject, path in subjects.items():
                write(f"{subject}/{split}-00000-of-00001.parquet", rows(path, subject))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "b", "c"]}, "row 1 of .*: choices are "),
        ({"answer": 4}, "row 1 of .*: the answer is 4; allowed: 0 to 3"),
        ({"question": None}, "row 1 of .*: question is None; allowed: a text"),
    ],
)
def test_a_broken_mmlu_row_of_parquet_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    mmlu_folder(tmp_path)
    for path in (tmp_path / "auxiliary_train").iterdir():
        path.unlink()
    good = {"question": "q", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 1}
    pq.write_table(pa.Table.from_pylist([good, {**good, **change}]), tmp_path / "auxiliary_train" / "train.parquet")
    with pytest.raises(DataError, match=message):
        inspect_text(TextSpec(name="mmlu", path=str(tmp_path)))


def test_winogrande_dev_is_for_judging_alone(tmp_path: Path) -> None:
    data = TextSpec(name="winogrande", path=wino_folder(tmp_path), validation=4)
    parts = split_documents(data, 0, WinoGrande(data).documents)
    assert {split: own for split, (own, _) in parts.items()} == {
        "train": "train",
        "validation": "train",
        "test": "test",
    }
    assert not set(parts["train"][1]) & set(parts["validation"][1])
