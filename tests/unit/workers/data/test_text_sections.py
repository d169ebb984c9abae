"""One book as one file is split inside, behind gaps; whole documents are held out wherever there are enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_makers import BYTES, samples_of, source_of, store

from cache_store.errors import ConfigError
from workers.data.text.corpora.sections import sections, too_few
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.tokens.tokenizers import BYTE_EOS
from workers.specs.language import TextSpec

BOTH = {"validation": 0.05, "test": 0.1}


@given(st.text(alphabet="ab \n", max_size=3000), st.floats(0.01, 0.6), st.floats(0.01, 0.6), st.integers(0, 500))
def test_sections_follow_each_other_and_never_overlap(text: str, first: float, second: float, gap: int) -> None:
    found = sections(text, {"validation": first, "test": second}, gap)
    assert list(found) == ["train", "validation", "test"]
    train, validation, test = found.values()
    assert 0 == train.start <= train.stop <= validation.start <= validation.stop <= test.start <= test.stop == len(text)


def test_shares_and_gaps_are_those_asked_for() -> None:
    text = "".join(f"line {i:04d}\n" for i in range(10_000))
    train, validation, test = (part.stop - part.start for part in sections(text, BOTH, 400).values())
    found = sections(text, BOTH, 400)
    assert abs(validation / len(text) - 0.05) < 0.001
    assert abs(test / len(text) - 0.1) < 0.001
    assert 390 <= found["validation"].start - found["train"].stop <= 410
    assert 390 <= found["test"].start - found["validation"].stop <= 410
    assert train + validation + test == len(text) - sum(
        found[later].start - found[before].stop for before, later in (("train", "validation"), ("validation", "test"))
    )
    assert all(text[part].endswith("\n") and text[part].startswith("line") for part in found.values())


@pytest.mark.parametrize(
    ("documents", "shares", "expected"),
    [
        ({"train": 1}, BOTH, BOTH),
        ({"train": 9}, BOTH, BOTH),  # 5 % of nine is none
        ({"train": 20}, BOTH, {}),
        ({"train": 1, "test": 3}, BOTH, {"validation": 0.05}),
        ({"train": 1, "validation": 1, "test": 3}, BOTH, {}),
        ({"train": 1}, {"validation": 1, "test": 1}, {}),
        ({"train": 2}, {"validation": 0.5, "test": 0.4}, {"validation": 0.5, "test": 0.4}),
    ],
)
def test_documents_are_split_inside_only_where_whole_ones_cannot_be_held_out(
    documents: dict[str, int], shares: dict[str, float], expected: dict[str, float]
) -> None:
    assert too_few(documents, shares) == expected


def test_a_book_trains_validates_and_tests_on_different_pages(tmp_path: Path) -> None:
    lines = [f"Sentence {i} of the book.\n" for i in range(2000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    data = TextSpec(name="text", path=str(tmp_path / "book.txt"), sequence_length=64)
    outline = inspect_text(data)
    assert outline.notes == (
        "one document, too few to hold whole ones out: validation and test are sections at the end, behind gaps of at "
        "most 256 characters",
    )
    snapshots = store()
    result = prepare_text(data, BYTES, 0, snapshots, fingerprint=outline.fingerprint)
    pages = {}
    for split in ("train", "validation", "test"):
        tokens = np.concatenate(
            [ids for ids, _, _ in samples_of(source_of(data, BYTES, split, snapshots, 0, result))]
        ).tolist()
        assert tokens.pop() == BYTE_EOS
        pages[split] = bytes(tokens).decode().splitlines(keepends=True)
    train, validation, test = pages.values()
    assert train == lines[: len(train)]
    assert test == lines[-len(test) :]
    first = lines.index(validation[0])
    assert validation == lines[first : first + len(validation)]
    for gap in (first - len(train), len(lines) - len(test) - first - len(validation)):
        assert 8 <= gap <= 12  # 256 characters
    with pytest.raises(ConfigError, match="1 of 1 documents leaves none to train on"):
        inspect_text(TextSpec(name="text", path=str(tmp_path / "book.txt"), validation=1))
