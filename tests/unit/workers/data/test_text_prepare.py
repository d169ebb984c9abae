"""Text is tokenized once: found again, restored after damage, its bad input named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_makers import BYTES, samples_of, source_of, spec_of, store, texts, word_tokenizer, write_lines, write_parquet

from cache_store.errors import ConfigError, DataError
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data.text import inspect, prepare
from workers.data.text.corpora import base as records
from workers.data.text.corpora.file_corpus import TEXTS, FileCorpus
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.samples import stored
from workers.data.text.samples.statistics import lengths_of
from workers.data.text.tokens.tokenizers import ByteTokenizer
from workers.specs.data_results import LengthFigures, TextDataResult
from workers.specs.language import CausalLMSpec, TextSpec


@pytest.fixture
def snapshots(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(open_storage(str(tmp_path / "store")))


@pytest.fixture
def data(tmp_path: Path) -> TextSpec:
    path = write_lines(tmp_path / "data" / "a.jsonl", [{"text": text} for text in texts(60)])
    return TextSpec(name="text", path=str(path), sequence_length=16)


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SHARD_BYTES", 9 * 64)


def test_the_result_is_json_and_its_figures_agree(data: TextSpec, snapshots: SnapshotStore) -> None:
    result = prepare_text(data, BYTES, 0, snapshots)
    assert TextDataResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert (result.pad, result.vocabulary, result.packed, result.restarts) == (256, 257, True, True)
    for split in ("train", "validation", "test"):
        source = source_of(data, BYTES, split, snapshots, 0, result)
        statistics = result.statistics[split]
        assert source.rows == result.rows[split] == statistics.samples.count
        assert source.tokens == result.tokens[split] == statistics.tokens
        assert source.targets.sum() == statistics.targets
        assert statistics.documents.count == inspect_text(data).documents[split]
        # Nothing is lost: every byte of every document, and an end for each.
        assert statistics.tokens == round(statistics.documents.mean * statistics.documents.count)


def test_progress_counts_documents_up_to_their_number(data: TextSpec, snapshots: SnapshotStore) -> None:
    seen: list[dict[str, Any]] = []
    prepare_text(data, BYTES, 0, snapshots, lambda **update: seen.append(update))
    assert seen[-1] == {"done": 60, "total": 60, "unit": "documents"}
    assert [update["done"] for update in seen] == sorted({update["done"] for update in seen})


def test_a_complete_set_is_not_tokenized_again(
    data: TextSpec, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_text(data, BYTES, 0, snapshots)
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, texts: pytest.fail("tokenized again"))
    assert prepare_text(data, BYTES, 0, snapshots) == first


@pytest.mark.usefixtures("many_shards")
def test_only_the_split_that_misses_a_shard_is_tokenized_and_only_that_shard_written(
    data: TextSpec, snapshots: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_text(data, BYTES, 0, snapshots)
    folder = tmp_path / "store" / "sets" / first.train.tokens
    assert len(list((folder / "commits").iterdir())) > 3
    (folder / "commits" / "000002.json").unlink()
    before = {path.name for path in (folder / "shards").iterdir()}
    tokenized: list[int] = []
    original = ByteTokenizer.encode
    monkeypatch.setattr(
        ByteTokenizer, "encode", lambda self, texts: (tokenized.append(len(texts)), original(self, texts))[1]
    )
    assert prepare_text(data, BYTES, 0, snapshots) == first
    assert sum(tokenized) == 54
    (added,) = {path.name for path in (folder / "shards").iterdir()} - before
    assert added.startswith("000002.")


@pytest.mark.usefixtures("many_shards")
@pytest.mark.parametrize("damage", ["token shards", "sample shard", "summary", "dropped set", "commits"])
def test_damaged_and_missing_shards_are_made_again_from_the_files(
    data: TextSpec, snapshots: SnapshotStore, tmp_path: Path, damage: str
) -> None:
    result = prepare_text(data, BYTES, 0, snapshots)
    good = samples_of(source_of(data, BYTES, "train", snapshots, 0, result))
    sets = tmp_path / "store" / "sets"
    tokens, table = sets / result.train.tokens, sets / result.train.samples
    if damage == "dropped set":
        snapshots.drop(tokens.name)
    else:
        victims = {
            "token shards": list((tokens / "shards").iterdir())[1:4],
            "sample shard": list((table / "shards").iterdir()),
            "summary": [path for folder in sets.iterdir() for path in (folder / "shards").iterdir()],
            "commits": [*(tokens / "commits").iterdir(), *(table / "commits").iterdir()],
        }[damage]
        for path in victims:
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-9] + b"x" * 9)
    again = SnapshotStore(open_storage(str(tmp_path / "store")))
    assert samples_of(source_of(data, BYTES, "train", again, 0, result)) == good


def test_text_that_changed_cannot_restore_what_was_lost(
    data: TextSpec, snapshots: SnapshotStore, tmp_path: Path
) -> None:
    result = prepare_text(data, BYTES, 0, snapshots)
    snapshots.drop(result.train.tokens)
    write_lines(tmp_path / "data" / "a.jsonl", [{"text": text} for text in texts(61)])
    with pytest.raises(DataError, match="have changed since it was tokenized; run again to plan anew"):
        source_of(data, BYTES, "train", snapshots, 0, result).batch(np.array([0]))


def test_files_that_changed_since_the_plan_are_refused(data: TextSpec, snapshots: SnapshotStore) -> None:
    planned = inspect_text(data).fingerprint
    prepare_text(data, BYTES, 0, snapshots, fingerprint=planned)
    assert data.path is not None
    write_lines(Path(data.path), [{"text": text} for text in texts(61)])
    with pytest.raises(DataError, match="changed since the run was planned"):
        prepare_text(data, BYTES, 0, snapshots, fingerprint=planned)


def test_whatever_changes_the_tokens_changes_the_identity(data: TextSpec, tmp_path: Path) -> None:
    word_tokenizer(tmp_path / "a")
    word_tokenizer(tmp_path / "b", template="{{ messages }}")
    word_tokenizer(tmp_path / "c", bos=True)
    changed = [
        {"sequence_length": 17},
        {"isolate": False},
        {"pack": False},
        {"pack": False, "sequence_length": 20},
        {"pack": False, "sequence_length": 20, "overlong": "drop"},
        {"validation": 5},
        {"train_limit": 8},
    ]
    sources = [source_of(data)]
    sources += [source_of(TextSpec(**{**vars(data), "allow_loss": True, **change})) for change in changed]
    sources += [source_of(data, seed=1)]
    sources += [source_of(data, spec_of(tmp_path / name)) for name in "abc"]
    assert len({source.identity for source in sources}) == len(sources)
    # Not where things lie, nor what only another split sees.
    assert source_of(data, spec_of(tmp_path / "a")).identity == sources[-3].identity
    assert source_of(TextSpec(**{**vars(data), "test_limit": 2})).identity == sources[0].identity
    splits = {source_of(data, split=split).identity for split in ("train", "validation", "test")}
    assert len(splits) == 3


def test_a_tokenizer_of_a_folder_puts_its_own_tokens_around_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts(12)])
    data = TextSpec(name="text", path=str(path), pack=False, validation=1, test=1)
    for bos in (False, True):
        tokenizer = word_tokenizer(tmp_path / f"t{bos}", bos=bos)
        found = samples_of(source_of(data, spec_of(tmp_path / f"t{bos}")))
        assert len(found) == 10
        decoded = [tokenizer.decode(ids) for ids, _, _ in found]
        assert {text.removeprefix("<s>").removesuffix("<|im_end|>") for text in decoded} < set(texts(12))
        assert all(text.startswith("<s>") == bos and text.count("<|im_end|>") == 1 for text in decoded)
        assert all(counted == list(range(1, len(ids))) for ids, _, counted in found)


def test_a_text_that_brings_its_own_beginning_gets_no_second_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "<s>" * (i % 2) + text} for i, text in enumerate(texts(12))])
    data = TextSpec(name="text", path=str(path), pack=False, validation=1, test=1)
    tokenizer = word_tokenizer(tmp_path / "t", bos=True)
    decoded = [tokenizer.decode(ids) for ids, _, _ in samples_of(source_of(data, spec_of(tmp_path / "t")))]
    assert {text.removeprefix("<s>").removesuffix("<|im_end|>") for text in decoded} < set(texts(12))
    assert all(text.count("<s>") == 1 for text in decoded)


def test_what_was_tokenized_in_another_way_is_neither_found_nor_taken_for_this(
    data: TextSpec, snapshots: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, planned = prepare_text(data, BYTES, 0, snapshots), inspect_text(data).fingerprint
    monkeypatch.setattr(inspect, "FORMAT", records.FORMAT - 1)
    assert inspect_text(data).fingerprint != planned
    monkeypatch.setattr(prepare, "FORMAT", records.FORMAT - 1)
    assert prepare_text(data, BYTES, 0, snapshots).train.tokens != first.train.tokens
    with pytest.raises(DataError, match="changed since the run was planned"):
        prepare_text(data, BYTES, 0, snapshots, fingerprint=planned)


def test_a_lone_surrogate_is_replaced_whatever_the_tokenizer(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"a\ud800 {i}"} for i in range(6)])
    data = TextSpec(name="text", path=str(path), pack=False, validation=1, test=1)
    tokenizer = word_tokenizer(tmp_path / "t")
    assert bytes(samples_of(source_of(data))[0][0][:-1]).startswith(b"a? ")
    assert tokenizer.decode(samples_of(source_of(data, spec_of(tmp_path / "t")))[0][0]).startswith("a? ")


def test_empty_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [*texts(10), "", None]})
    data = TextSpec(name="text", path=str(path), pack=False, validation=2, test=2)
    statistics = prepare_text(data, BYTES, 0, store()).statistics
    assert sum(part.empty for part in statistics.values()) == 2
    assert sum(part.samples.count for part in statistics.values()) == 10


def test_overlong_documents_are_cut_dropped_or_refused_and_counted(tmp_path: Path) -> None:
    contents = ["x" * (10 + i) for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in contents])
    base = {"name": "text", "path": str(path), "pack": False, "sequence_length": 30, "validation": 10, "test": 10}
    cut = prepare_text(TextSpec(**base), BYTES, 0, store()).statistics
    assert sum(part.truncated for part in cut.values()) == 20
    assert max(part.samples.max for part in cut.values()) == 30
    assert max(part.documents.max for part in cut.values()) == 50
    dropped = prepare_text(TextSpec(**base, overlong="drop"), BYTES, 0, store()).statistics
    assert sum(part.dropped for part in dropped.values()) == 20
    assert sum(part.samples.count for part in dropped.values()) == 20
    with pytest.raises(DataError, match=r"row \d+ of .*a\.jsonl: it takes \d+ tokens; data\.sequence_length allows 30"):
        prepare_text(TextSpec(**base, overlong="refuse"), BYTES, 0, store())
    packed = prepare_text(TextSpec(**{**base, "pack": True}, overlong="refuse"), BYTES, 0, store()).statistics
    assert all(part.truncated == part.dropped == 0 for part in packed.values())


def test_length_statistics_are_of_real_lengths() -> None:
    hundred = LengthFigures(count=100, min=1, max=100, mean=50.5, p5=5, p50=50, p95=95, p99=99)
    assert lengths_of(np.arange(1, 101)) == hundred
    assert lengths_of(np.array([7])) == LengthFigures(count=1, min=7, max=7, mean=7.0, p5=7, p50=7, p95=7, p99=7)
    assert lengths_of(np.array([], np.int64)).to_json() == {"count": 0}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"tokenizer": "bytes", "config": {"vocab_size": 256}}, "bytes has 257 tokens, the model's vocabulary 256"),
        ({"tokenizer": "bytes", "config": {"text_config": {"vocab_size": 9}}}, "the model's vocabulary 9"),
        ({"tokenizer": "bytes", "config": {"max_position_embeddings": 15}}, r"sequence_length: 16 .*allowed: 2 to 15"),
        ({"tokenizer": "bytes", "config": {"n_positions": 8}}, "allowed: 2 to 8"),
        ({}, r"model\.tokenizer: none given, and the model has no path"),
        ({"tokenizer": "{here}/no such folder"}, "cannot load a tokenizer from .*no such folder"),
        ({"path": "{here}/empty"}, "cannot load a tokenizer from .*empty"),
        ({"path": "{here}/broken"}, "cannot load a tokenizer from .*broken"),
        ({"path": "{here}/empty", "gguf": "no.gguf"}, "empty/no.gguf"),
        ({"tokenizer": "{here}/endless", "config": {}}, "no end-of-text token"),
        ({"tokenizer": "{here}/endless", "config": {"vocab_size": 10}}, "the model's vocabulary 10"),
    ],
)
def test_a_tokenizer_or_length_that_does_not_fit_the_model_is_refused(
    data: TextSpec, snapshots: SnapshotStore, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    word_tokenizer(tmp_path / "endless", eos=None)
    here = {key: value.format(here=tmp_path) if isinstance(value, str) else value for key, value in model.items()}
    with pytest.raises(ConfigError, match=message):
        prepare_text(data, CausalLMSpec(family="causal_lm", **here), 0, snapshots)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([7] * 9, r"row 0 of .*a\.jsonl: int instead of a text"),
        ([*["x"] * 8, {"a": 1}], r"row 8 of .*a\.jsonl: dict instead of a text"),
        (
            [""] * 9,
            r"no samples are left of 0 documents \(0 truncated, 0 dropped, 7 empty, 0 skipped, 0 without_targets\)",
        ),
    ],
)
def test_documents_that_are_no_texts_are_named(
    tmp_path: Path, snapshots: SnapshotStore, values: list[Any], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": value} for value in values])
    with pytest.raises(DataError, match=message):
        prepare_text(TextSpec(name="text", path=str(path), validation=1, test=1), BYTES, 0, snapshots)


def test_a_row_that_is_no_json_is_named_when_it_is_reached(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts(9)])
    corpus = FileCorpus(TextSpec(name="text", path=str(path), validation=1, test=1), TEXTS)
    # Written to since it was counted.
    path.write_text(path.read_text().replace("#8", "#8\n"))
    with pytest.raises(DataError, match=r"a\.jsonl has grown while it was read"):
        list(corpus.records("train", np.ones(9, bool)))
    path.write_text(path.read_text().replace("#8\n", "#8"))
    path.write_text(path.read_text()[:-4])
    *sound, broken = [record for _, record in corpus.records("train", np.ones(9, bool))]
    assert [record.error for record in sound] == [None] * 8
    assert re.fullmatch(r"row 8 of .*a\.jsonl: not JSON in line 9: .*", str(broken.error))


def test_a_plain_file_that_is_not_utf8_is_named(tmp_path: Path, snapshots: SnapshotStore) -> None:
    for i in range(5):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{i}.txt").write_bytes(b"abc" + b"\xff" * (i == 3))
    with pytest.raises(DataError, match=r"3\.txt: byte 3 is not UTF-8"):
        prepare_text(TextSpec(name="text", path=str(tmp_path / "data"), validation=1, test=1), BYTES, 0, snapshots)
