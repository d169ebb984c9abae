"""Digests of questions: which ones are the same, which are near, and what is kept of many."""

from __future__ import annotations

import io

import numpy as np
import pytest

from cache_store.errors import DataError
from workers.overlap import TrainedQuestions, digest_questions

LONG = (
    "Which of the two bones of the lower leg carries the greater part of the weight of a standing person\ntibia\nulna"
)


def numbered(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


def test_case_punctuation_and_spaces_do_not_make_another_question() -> None:
    found = digest_questions(["Is it so?\nYes\nNo", "The cup beat the box because _ was tall.\nthe cup\nthe box"])
    assert found.likeness("is  it SO\n\nyes; no") == "same"
    assert found.likeness("The cup beat the box because was tall\nThe cup\nthe box") == "same"
    assert found.likeness("Is it so?\nNo\nYes") is None
    assert digest_questions(["Ｆｕｌｌ width"]).likeness("full width") == "same"


def test_thirteen_words_in_a_row_are_near_and_twelve_are_not() -> None:
    found = digest_questions([numbered(0, 40)])
    assert found.likeness(f"before {numbered(20, 13)} after") == "near"
    assert found.likeness(f"before {numbered(20, 12)} after") is None
    assert found.likeness(numbered(0, 13)) == "near"
    assert found.likeness(numbered(0, 12)) is None
    assert digest_questions([LONG]).likeness(LONG.replace("ulna", "fibula")) == "near"


def test_words_in_another_order_are_not_near() -> None:
    found = digest_questions([LONG])
    assert found.likeness(" ".join(reversed(LONG.split()))) is None


def test_a_row_of_words_that_more_than_ten_questions_have_is_a_phrase() -> None:
    phrase = numbered(0, 13)
    for count, expected in ((10, "near"), (11, None)):
        found = digest_questions([f"question {number} {phrase}" for number in range(count)])
        assert found.likeness(f"another {phrase}") == expected
    # In one question, however often, it is none.
    assert digest_questions([f"{phrase} x " * 12]).likeness(f"another {phrase}") == "near"


def test_of_many_rows_of_words_the_lower_hashes_are_kept_counted_right() -> None:
    texts = [numbered(1000 * number, 40) for number in range(200)]
    phrase = numbered(900_000, 40)
    texts = [text for pair in zip(texts, [phrase] * 11 + texts, strict=False) for text in pair]
    whole, part = digest_questions(texts), digest_questions(texts, most=1000)
    assert (whole.highest, len(whole.grams)) == ((1 << 64) - 1, 200 * 28)
    assert 400 < len(part.grams) <= 1000
    np.testing.assert_array_equal(part.grams, whole.grams[whole.grams <= np.uint64(part.highest)])
    np.testing.assert_array_equal(part.texts, whole.texts)
    assert all(part.likeness(text) == "same" for text in texts)
    near = [part.likeness(f"x {text}") for text in texts[::2]]
    assert near.count("near") > 0.9 * len(near)


def test_files_of_digests_are_the_same_bytes_and_say_when_they_are_none() -> None:
    found = digest_questions([LONG, "a"])
    data = found.to_bytes()
    assert digest_questions(["a", LONG, "A?"]).to_bytes() == data
    again = TrainedQuestions.from_bytes(data, "x")
    assert (again.likeness("a"), again.likeness("b")) == ("same", None)
    with pytest.raises(DataError, match="x: holds no digests"):
        TrainedQuestions.from_bytes(data[:100], "x")
    with pytest.raises(DataError, match="x: holds no digests"):
        TrainedQuestions.from_bytes(b"", "x")
    stream = io.BytesIO()
    np.savez(stream, format=[7], texts=[0], grams=[0], highest=[0])
    with pytest.raises(DataError, match="format 7; this version reads 1"):
        TrainedQuestions.from_bytes(stream.getvalue(), "x")


def test_what_two_runs_trained_on_can_be_joined() -> None:
    one, two = digest_questions([LONG]), digest_questions(["a", numbered(0, 60)], most=20)
    both = one | two
    assert (both.likeness(LONG), both.likeness("a"), both.likeness(numbered(0, 60))) == ("same",) * 3
    assert both.highest == two.highest
    assert set(two.grams) <= set(both.grams)
    assert both.grams.max() <= both.highest
