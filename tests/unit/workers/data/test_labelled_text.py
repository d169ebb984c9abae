"""Labelled text: rows, pairs and classes of every kind of file, splits, and the batches that come of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text_classifiers import word_pieces
from text_makers import BYTES, store, write_lines

from cache_store.errors import DataError
from cache_store.snapshots.store import SnapshotStore
from workers.data.text.labelled.corpus import inspect_labelled
from workers.data.text.labelled.prepare import prepare_labelled
from workers.data.text.labelled.source import LabelledSource
from workers.domains.labelled.planning import LABELLED
from workers.specs.as_json import from_json, to_json
from workers.specs.experiment import Experiment
from workers.specs.language import CausalLMSpec, LabelledTextSpec
from workers.specs.tasks import DataTask

ROWS = [{"text": f"w{number} w{number + 1}", "label": ["no", "yes", "maybe"][number % 3]} for number in range(20)]


def spec(path: Path | str, **given: Any) -> LabelledTextSpec:
    return LabelledTextSpec(**{"path": str(path), "validation": 3, "test": 4, "sequence_length": 16, **given})


def typed(folder: Path, **config: Any) -> CausalLMSpec:
    """A tokenizer of words for a model that tells two texts apart."""
    word_pieces(folder)
    own = {"vocab_size": 44, "type_vocab_size": 2, "pad_token_id": 0, **config}
    return CausalLMSpec(family="causal_lm", tokenizer=str(folder), config=own)


def source(
    data: LabelledTextSpec, model: CausalLMSpec = BYTES, split: str = "train", snapshots: SnapshotStore | None = None
) -> LabelledSource:
    snapshots = snapshots or store()
    result = prepare_labelled(data, model, 0, snapshots)
    return LabelledSource(Experiment(model=model, data=data, classes=3, seed=0), result, snapshots, split)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        write_lines(path, rows)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet", "arrow"])
def test_rows_of_every_kind_of_file_make_the_same_samples(suffix: str, tmp_path: Path) -> None:
    data = spec(write(tmp_path / f"rows.{suffix}", ROWS))
    outline = inspect_labelled(data)
    assert (outline.rows, outline.class_names) == ({"train": 13, "validation": 3, "test": 4}, ("maybe", "no", "yes"))
    snapshots = store()
    seen = []
    for split, count in outline.rows.items():
        own = source(data, split=split, snapshots=snapshots)
        assert own.rows == count
        batch = own.padded(np.arange(count))
        for ids, mask, label in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], own.labels, strict=True):
            seen.append((bytes(ids[mask.bool()].tolist()).decode(), outline.class_names[int(label)]))
            assert (ids[~mask.bool()] == 256).all()
    assert sorted(seen) == sorted((row["text"], row["label"]) for row in ROWS)


def test_pairs_are_encoded_and_cut_as_transformers_does(tmp_path: Path) -> None:
    model = typed(tmp_path / "tokenizer")
    rows = [
        {
            "premise": " ".join(f"w{k}" for k in range(n % 9 + 1)),
            "hypothesis": f"w{n}" + " w3" * (n % 5),
            "label": n % 2,
        }
        for n in range(20)
    ]
    lengths = [n % 9 + 1 + 1 + n % 5 + 3 for n in range(20)]
    data = spec(write(tmp_path / "rows.jsonl", rows), sequence_length=8)
    own = source(data, model)
    tokenizer = word_pieces(tmp_path / "again")
    batch = own.padded(np.arange(own.rows))
    for index in range(own.rows):
        kept = batch.inputs["attention_mask"][index].bool()
        ids = batch.inputs["input_ids"][index][kept].tolist()
        second = ids[ids.index(3) + 1] - 4
        want = tokenizer(rows[second]["premise"], rows[second]["hypothesis"], truncation="longest_first", max_length=8)
        assert ids == want["input_ids"]
        assert batch.inputs["token_type_ids"][index][kept].tolist() == want["token_type_ids"]
        assert own.labels[index] == rows[second]["label"]
    statistics = prepare_labelled(data, model, 0, store()).statistics
    assert sum(part.truncated for part in statistics.values()) == sum(length > 8 for length in lengths)
    dropped = prepare_labelled(replace(data, overlong="drop"), model, 0, store())
    assert sum(dropped.rows.values()) == sum(length <= 8 for length in lengths)
    with pytest.raises(DataError, match=r"row \d+ of .*rows.jsonl: it takes \d+ tokens"):
        prepare_labelled(replace(data, overlong="refuse"), model, 0, store())


def test_a_model_that_does_not_tell_texts_apart_is_given_one_type(tmp_path: Path) -> None:
    rows = [{"sentence1": "w1", "sentence2": "w2", "label": n % 2} for n in range(20)]
    data = spec(write(tmp_path / "rows.jsonl", rows))
    own = source(data, typed(tmp_path / "tokenizer", type_vocab_size=1, pad_token_id=1))
    batch = own.padded(np.arange(2))
    assert batch.inputs["token_type_ids"].sum() == 0
    assert source(data, typed(tmp_path / "tokenizer")).padded(np.arange(2)).inputs["token_type_ids"].sum() > 0


def test_splits_are_the_datas_own_by_name_or_by_pattern(tmp_path: Path) -> None:
    for name, count in (("train", 9), ("validation_matched", 5), ("validation_mismatched", 6), ("test", 4)):
        write(tmp_path / f"{name}-00000-of-00001.parquet", ROWS[:count])
    assert inspect_labelled(spec(tmp_path)).rows == {"train": 6, "validation": 3, "test": 4}
    mnli = spec(tmp_path, files={"train": "train-*", "test": "validation_matched-*"}, validation=0.25)
    assert inspect_labelled(mnli).rows == {"train": 7, "validation": 2, "test": 5}
    with pytest.raises(DataError, match=r"data.files: no files for test: dev-\*"):
        inspect_labelled(replace(mnli, files={"train": "train-*", "test": "dev-*"}))


def test_labels_are_names_or_numbers_of_the_list_that_is_given(tmp_path: Path) -> None:
    rows = [{"text": "w1", "label": [0, 2, "good", "1"][n % 4]} for n in range(20)]
    data = spec(write(tmp_path / "rows.jsonl", rows), labels=("bad", "so so", "good"))
    assert inspect_labelled(data).class_names == ("bad", "so so", "good")
    counts = sum(
        np.bincount(source(data, split=split).labels, minlength=3) for split in ("train", "validation", "test")
    )
    assert counts.tolist() == [5, 5, 10]
    with pytest.raises(DataError, match=r"row 2 of .*: its label 'good' is none of the classes; did you mean 'goods'"):
        inspect_labelled(replace(data, labels=("bad", "goods", "x")))


def test_numbers_are_classes_in_their_order_and_files_of_the_hub_name_them(tmp_path: Path) -> None:
    rows = [{"text": "w1", "label": (3, 10, 2)[n % 3]} for n in range(300)]
    path = write(tmp_path / "numbers.parquet", rows)
    assert inspect_labelled(spec(path)).class_names == ("2", "3", "10")
    assert inspect_labelled(spec(write(tmp_path / "n.csv", rows))).class_names == ("2", "3", "10")
    table = pa.table({"text": ["w1"] * 8, "label": [0, 1] * 4})
    info = {"info": {"features": {"label": {"names": ["neg", "pos", "none"], "_type": "ClassLabel"}}}}
    hub = tmp_path / "hub.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), hub)
    assert inspect_labelled(spec(hub, validation=1, test=1)).class_names == ("neg", "pos", "none")


def test_a_class_behind_the_rows_that_are_looked_at_first_is_found(tmp_path: Path) -> None:
    rows = [{"text": "w1", "label": "late" if n == 700 else "early"} for n in range(701)]
    assert inspect_labelled(spec(write(tmp_path / "rows.parquet", rows))).class_names == ("early", "late")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": None, "label": "a"}, "its text is empty"),
        ({"text": "", "label": "a"}, "its text is empty"),
        ({"text": ["x"], "label": "a"}, "its text is a list; allowed: a text"),
        ({"text": "x", "label": None}, "it has no label"),
        ({"text": "x", "label": " "}, "it has no label"),
        ({"text": "x", "label": 0.5}, "its label is 0.5; allowed: a text or a whole number"),
        ({"text": "x", "label": -1}, "its label is -1, which stands for none"),
        ({"text": "x"}, "has no 'label'"),
    ],
)
def test_rows_that_cannot_be_used_are_named_or_skipped(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=words) as refused:
        inspect_labelled(spec(path))
    assert f"row 20 of {path}" in refused.value.message
    skipping = spec(path, bad="skip")
    assert inspect_labelled(skipping).class_names == ("maybe", "no", "yes")
    statistics = prepare_labelled(skipping, BYTES, 0, store()).statistics
    assert sum(part.skipped or 0 for part in statistics.values()) == 1


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"txt": "x", "label": 1}], {}, "has no column of texts .it has txt, label"),
        ([{"text": "x", "class": 1}], {}, "has no 'label'"),
        ([{"text": "x", "label": 1}], {"columns": {"pair": "txet"}}, "has no 'txet'; did you mean 'text'"),
        ([{"text": "x", "label": 1}] * 9, {"validation": 1, "test": 1}, "all rows at .* are of one class, '1'"),
    ],
)
def test_files_without_what_is_needed_are_refused(
    rows: list[dict[str, Any]], given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        inspect_labelled(spec(write(tmp_path / "rows.csv", rows), **given))


def test_the_first_samples_are_shown_with_their_class_as_they_are_trained_on(tmp_path: Path) -> None:
    data = spec(write(tmp_path / "rows.jsonl", ROWS), sequence_length=4)
    model = typed(tmp_path / "tokenizer")
    shown = LABELLED.preview(replace(data, sequence_length=3), model, 0, "train", 5)
    own = source(replace(data, sequence_length=3), model)
    batch = own.padded(np.arange(5))
    names = inspect_labelled(data).class_names
    assert shown.documents == own.rows
    for index, sample in enumerate(shown.samples):
        text, name = sample.runs
        assert list(text.tokens) == batch.inputs["input_ids"][index].tolist()
        assert (name.text, name.target, sample.cut) == (f" {names[int(own.labels[index])]}", True, 1)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"q": "w1", "a": "w2", "text": "w3", "kind": n % 2} for n in range(20)]
    path = write(tmp_path / "rows.csv", rows)
    own = source(spec(path, columns={"text": "q", "pair": "a", "label": "kind"}), typed(tmp_path / "tokenizer"))
    assert own.padded(np.arange(1)).inputs["input_ids"].tolist() == [[2, 5, 3, 6, 3]]
    single = source(spec(path, columns={"label": "kind"}), typed(tmp_path / "tokenizer"))
    assert single.padded(np.arange(1)).inputs["input_ids"].tolist() == [[2, 7, 3]]


def test_shards_that_are_lost_are_made_again_and_nothing_is_tokenized_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    data, snapshots = spec(path), store()
    first = prepare_labelled(data, BYTES, 0, snapshots)
    task = DataTask(data=data, fingerprint=inspect_labelled(data).fingerprint, seed=0, model=BYTES)
    stage = replace(data, path=None, labels=("maybe", "no", "yes"))
    prepared = replace(first, origin=to_json(task))
    own = LabelledSource(Experiment(model=BYTES, data=stage, classes=3, seed=0), prepared, snapshots, "train")
    want = own.padded(np.arange(own.rows)).inputs["input_ids"]
    again = store()
    restored = LabelledSource(Experiment(model=BYTES, data=stage, classes=3, seed=0), prepared, again, "train")
    assert (restored.padded(np.arange(own.rows)).inputs["input_ids"] == want).all()
    assert prepare_labelled(data, BYTES, 0, again) == first
    path.unlink()
    with pytest.raises(DataError):
        LabelledSource(Experiment(model=BYTES, data=stage, classes=3, seed=0), prepared, store(), "train")


def test_what_a_configuration_says_wrongly_is_named_without_looking_at_files() -> None:
    def problems(**given: Any) -> list[str]:
        return [f"{'.'.join(map(str, path))}: {words}" for path, words in LABELLED.problems(spec("nowhere", **given))]

    assert problems() == []
    assert problems(columns={"txet": "x"}) == [
        "data.columns: 'txet' is nothing that a column can be; did you mean 'text'?; allowed: text, pair, label"
    ]
    assert "must be at least two" in problems(labels=("one",))[0]
    assert "each of its own name" in problems(labels=("one", "one"))[0]
    assert problems(files={"test": "x"}) == ["data.files: none given for train"]
    assert problems(files={"train": "x", "tests": "x"}) == [
        "data.files: 'tests' is no split; did you mean 'test'?; allowed: train, validation, test"
    ]
    assert "whole number of samples" in problems(validation=1.5)[0]


def test_the_spec_travels_as_json_and_is_told_from_other_text() -> None:
    data = spec("x", labels=("a", "b"), files={"train": "t*"})
    task = DataTask(data=data, fingerprint="f", model=BYTES)
    assert from_json(DataTask, json.loads(json.dumps(to_json(task)))) == task
    assert isinstance(from_json(DataTask, to_json(replace(task, data=data.as_text()))).data, type(data.as_text()))
