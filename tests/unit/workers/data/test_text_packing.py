"""Samples and batches against a token-by-token oracle in plain Python."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_makers import BYTES, samples_of, source_of, store, texts, write_lines

from cache_store.errors import ConfigError, DataError
from workers.data.text import prepare
from workers.data.text.prepare import prepare_text
from workers.data.text.samples import layout, stored
from workers.data.text.samples.ragged import flat_rows
from workers.data.text.splits import split_documents
from workers.data.text.tokens.tokenizers import BYTE_EOS
from workers.specs.language import TextSpec

Sample = tuple[list[int], list[int], list[int]]


def naive(documents: list[str], length: int, pack: bool, isolate: bool, overlong: str) -> list[Sample]:
    """(tokens, positions, places that count) of every sample, one token at a time."""
    pieces: list[list[tuple[int, bool]]] = []  # (token, begins a document)
    for text in documents:
        tokens = [*text.encode(), BYTE_EOS] if text else []
        pieces.append([(token, place == 0) for place, token in enumerate(tokens)])
    if pack:
        stream = [item for piece in pieces for item in piece]
        pieces = [stream[at : at + length] for at in range(0, len(stream), length)]
    elif overlong == "drop":
        pieces = [piece for piece in pieces if len(piece) <= length]
    samples = []
    for piece in pieces:
        cut = piece[:length]
        positions, counted = [], []
        for place, (_, begins) in enumerate(cut):
            restart = place == 0 or (pack and isolate and begins)
            positions.append(0 if restart else positions[-1] + 1)
            if place > 0 and not begins:
                counted.append(place)
        if counted:
            samples.append(([token for token, _ in cut], positions, counted))
    return samples


@given(
    documents=st.lists(st.text(max_size=12), min_size=4, max_size=14),
    length=st.integers(2, 9),
    pack=st.booleans(),
    isolate=st.booleans(),
    overlong=st.sampled_from(["truncate", "drop"]),
    seed=st.integers(0, 3),
    small=st.booleans(),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_samples_and_batches_are_those_of_a_token_by_token_oracle(
    documents: list[str],
    length: int,
    pack: bool,
    isolate: bool,
    overlong: Literal["truncate", "drop"],
    seed: int,
    small: bool,
    data: st.DataObject,
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if small:  # several shards, several looks at the flags
            patch.setattr(stored, "SHARD_BYTES", 9 * 11)
            patch.setattr(layout, "_CHUNK", 5)
            patch.setattr(prepare, "_BATCH_DOCUMENTS", 2)
        path = write_lines(Path(folder) / "a.jsonl", [{"text": text} for text in documents])
        spec = TextSpec(
            name="text",
            path=str(path),
            sequence_length=length,
            pack=pack,
            isolate=isolate,
            overlong=overlong,
            validation=1,
            test=1,
            allow_loss=True,
        )
        parts = split_documents(spec, seed, {"train": len(documents)})
        expected = {
            split: naive([_replaced(documents[i]) for i in numbers], length, pack, isolate, overlong)
            for split, (_, numbers) in parts.items()
        }
        snapshots = store()
        if not all(expected.values()):
            with pytest.raises(DataError, match="no samples are left"):
                prepare_text(spec, BYTES, seed, snapshots)
            return
        result = prepare_text(spec, BYTES, seed, snapshots)
        for split, samples in expected.items():
            source = source_of(spec, BYTES, split, snapshots, seed, result)
            assert samples_of(source) == samples
            assert source.rows == result.rows[split] == len(samples)
            assert source.offsets.tolist() == np.cumsum([0, *(len(sample[0]) for sample in samples)]).tolist()
            assert source.targets.tolist() == [len(sample[2]) for sample in samples]
            rows = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=6))
            check_batch(source.batch(np.array(rows)), [samples[row] for row in rows])


def _replaced(text: str) -> str:
    return text.encode(errors="replace").decode()


def check_batch(batch: Any, samples: list[Sample]) -> None:
    longest = max(len(tokens) for tokens, _, _ in samples)
    ids, positions, mask, where, targets = [], [], [], [], []
    for line, (tokens, places, counted) in enumerate(samples):
        padding = [0] * (longest - len(tokens))
        ids.append(tokens + [BYTE_EOS] * len(padding))
        positions.append(places + padding)
        mask.append([True] * len(tokens) + [False] * len(padding))
        where += [line * longest + place - 1 for place in counted]
        targets += [tokens[place] for place in counted]
    assert batch.ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    if all(map(all, mask)):
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask.tolist() == mask
    assert batch.where.tolist() == where
    assert batch.targets.tolist() == targets
    assert {str(t.dtype) for t in (batch.ids, batch.position_ids, batch.where, batch.targets)} == {"torch.int64"}


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=8))
def test_flat_rows_are_the_ranges_one_after_the_other(ranges: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([pair[k] for pair in ranges], np.int64) for k in (0, 1))
    assert flat_rows(starts, lengths).tolist() == [s + i for s, n in ranges for i in range(n)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 30))
def test_chunks_hold_whole_samples_within_the_bound_unless_one_alone_is_longer(lengths: list[int], bound: int) -> None:
    ranges = layout.chunks(np.array(lengths), bound)
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(lengths)))
    assert all(sum(lengths[a:b]) <= bound or b == a + 1 for a, b in ranges)


def jsonl(folder: Path, count: int = 40) -> str:
    return str(write_lines(folder / "a.jsonl", [{"text": text} for text in texts(count)]))


def test_token_rows_are_the_samples_tokens_in_the_order_asked_for(tmp_path: Path) -> None:
    source = source_of(TextSpec(name="text", path=jsonl(tmp_path), sequence_length=16))
    rows = np.array([2, 0, 2])
    expected = [t for row in rows for t in range(source.offsets[row], source.offsets[row + 1])]
    assert source.token_rows(rows).tolist() == expected
    with pytest.raises(IndexError, match=f"a split of {source.rows}"):
        source.token_rows(np.array([source.rows]))
    with pytest.raises(IndexError, match="rows -1"):
        source.batch(np.array([-1]))


def test_train_validation_and_test_share_no_document_and_leave_none_out(tmp_path: Path) -> None:
    parts = split_documents(TextSpec(name="text", path="x"), 3, {"train": 200})
    numbers = [set(part[1].tolist()) for part in parts.values()]
    assert [len(part) for part in numbers] == [180, 10, 10]
    assert set.union(*numbers) == set(range(200))
    assert all(part[0] == "train" for part in parts.values())


def test_another_seed_holds_out_other_documents_and_a_larger_test_split_leaves_validation_alone() -> None:
    def held(seed: int, **settings: Any) -> list[int]:
        data = TextSpec(name="text", path="x", **settings)
        return split_documents(data, seed, {"train": 200})["validation"][1].tolist()

    assert held(0) != held(1)
    assert held(0) == held(0, test=60) == held(0, train_limit=3)


def test_splits_of_the_data_itself_are_taken_as_they_are() -> None:
    parts = split_documents(TextSpec(name="text", path="x"), 0, {"train": 100, "validation": 7, "test": 5})
    assert {split: (own, len(numbers)) for split, (own, numbers) in parts.items()} == {
        "train": ("train", 100),
        "validation": ("validation", 7),
        "test": ("test", 5),
    }


@pytest.mark.parametrize(
    ("settings_of", "documents", "message"),
    [
        ({}, 9, r"data\.validation: 0\.05 of 9 documents leaves none for validation"),
        ({}, 1, "A plain text file is one document"),
        ({"validation": 2.5}, 9, "no whole number"),
        ({"validation": 5, "test": 5}, 10, "leave none to train on"),
        ({"validation": 12}, 10, "holds out 1 to 9"),
    ],
)
def test_a_split_without_documents_is_refused(settings_of: dict[str, Any], documents: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_documents(TextSpec(name="text", path="x", **settings_of), 0, {"train": documents})


def test_a_limit_of_packed_data_takes_samples_and_of_padded_data_documents(tmp_path: Path) -> None:
    for pack in (True, False):
        every = TextSpec(name="text", path=jsonl(tmp_path), sequence_length=16, pack=pack, allow_loss=True)
        some = TextSpec(
            name="text", path=jsonl(tmp_path), sequence_length=16, pack=pack, train_limit=7, allow_loss=True
        )
        snapshots = store()
        whole, limited = (prepare_text(data, BYTES, 0, snapshots) for data in (every, some))
        assert limited.rows["train"] == 7
        assert limited.validation == whole.validation
        chosen = samples_of(source_of(some, BYTES, "train", snapshots, 0, limited))
        everything = samples_of(source_of(every, BYTES, "train", snapshots, 0, whole))
        assert all(sample in everything for sample in chosen)
        assert chosen != everything[:7]
