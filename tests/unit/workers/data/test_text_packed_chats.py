"""Chats packed whole: as many as fit a sample, nothing lost, positions restarting, hardly any padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_makers import samples_of, source_of, spec_of, store, word_tokenizer, write_lines

from workers.data.text.formats import packing_of
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.samples.layout import best_fit
from workers.specs.language import TextSpec

LENGTH = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    word_tokenizer(folder / "tokenizer")
    draws = np.random.default_rng(0).integers(1, 60, 80).tolist()
    rows = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x" * size}]
        for i, size in enumerate(draws)
    ]
    rows[5][1]["content"] = ""  # nothing to learn
    rows[6][0]["content"] = "y" * 260  # longer than a sample
    write_lines(folder / "a.jsonl", [{"messages": row} for row in rows])
    return folder


def chats(folder: Path, **settings: Any) -> TextSpec:
    held_out = {"validation": 8, "test": 8}
    return TextSpec(
        name="chat", path=str(folder / "a.jsonl"), **{"sequence_length": LENGTH, "pack": True, **held_out, **settings}
    )


def read(data: TextSpec, folder: Path, split: str = "train") -> list[tuple[list[int], list[int], list[int]]]:
    snapshots, model = store(), spec_of(folder / "tokenizer")
    result = prepare_text(data, model, 0, snapshots, fingerprint=inspect_text(data).fingerprint)
    assert result.restarts == (data.pack is True and data.isolate)
    return samples_of(source_of(data, model, split, snapshots, 0, result))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_chats_are_the_same_chats_with_the_same_targets(folder: Path, split: str) -> None:
    alone = read(chats(folder, pack="auto"), folder, split)
    packed = read(chats(folder), folder, split)
    assert len(packed) < len(alone)
    assert max(len(tokens) for tokens, _, _ in packed) <= LENGTH
    found = []
    for tokens, positions, targets in packed:
        starts = [place for place, position in enumerate(positions) if position == 0]
        for first, last in zip(starts, [*starts[1:], len(tokens)], strict=True):
            own = [place - first for place in targets if first <= place < last]
            found.append((tokens[first:last], positions[first:last], own))
    assert sorted(found) == sorted(alone)


def test_chats_that_see_each_other_have_positions_that_go_on(folder: Path) -> None:
    apart, together = read(chats(folder), folder), read(chats(folder, isolate=False), folder)
    assert [(tokens, targets) for tokens, _, targets in apart] == [(tokens, targets) for tokens, _, targets in together]
    assert all(positions == list(range(len(positions))) for _, positions, _ in together)


def test_limits_take_samples_and_a_limit_is_part_of_the_whole(folder: Path) -> None:
    whole, some = read(chats(folder), folder), read(chats(folder, train_limit=5), folder)
    assert len(some) == 5
    assert all(sample in whole for sample in some)


@given(st.lists(st.integers(1, 50), max_size=200))
def test_no_sample_takes_more_than_fits_and_no_two_could_be_one(lengths: list[int]) -> None:
    bins = best_fit(np.array(lengths, np.int64), 50)
    filled = np.bincount(bins, np.array(lengths), max(bins, default=-1) + 1) if lengths else np.empty(0)
    assert (filled <= 50).all()
    assert (filled > 0).all()
    # Best fit opens a sample only where nothing has room: the two emptiest never fit into one.
    assert len(filled) < 2 or np.sort(filled)[:2].sum() > 50
    # Samples go by their first documents.
    assert [bins.tolist().index(sample) for sample in range(len(filled))] == sorted(
        bins.tolist().index(sample) for sample in range(len(filled))
    )


@pytest.mark.parametrize("longest", [1024, 2048, 4096])
def test_at_lengths_of_usual_instruction_sets_nearly_all_that_is_computed_is_real(longest: int) -> None:
    # Lengths spread as those of Alpaca and Dolly do: half below 120 tokens, a long tail.
    lengths = np.clip(np.random.default_rng(1).lognormal(4.8, 0.9, 20_000), 10, longest).astype(np.int64)
    padded = np.array([batch.max() * len(batch) for batch in np.array_split(lengths, len(lengths) // 16)]).sum()
    filled = np.bincount(best_fit(lengths, longest), lengths)
    batches = np.array_split(filled, max(1, len(filled) // 16))
    packed = np.array([batch.max() * len(batch) for batch in batches]).sum()
    assert lengths.sum() / padded < 0.5
    assert lengths.sum() / packed > 0.97


def test_which_data_are_packed_and_how() -> None:
    def packing(name: Any, pack: Any) -> str:
        return packing_of(TextSpec(name=name, pack=pack))

    assert [packing("text", pack) for pack in ("auto", True, False)] == ["cut", "cut", "none"]
    assert [packing("chat", pack) for pack in ("auto", True, False)] == ["none", "whole", "none"]
    assert [packing("mmlu", pack) for pack in ("auto", True, False)] == ["none"] * 3
