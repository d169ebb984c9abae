"""Digests of the questions that a model was trained on, by which a judge knows them and their near-duplicates again.

Text is compared by its words: lower case, no punctuation. Two questions are the same when all their words are, and near
when they share 13 words in a row (Brown et al. 2020, appendix C), but for rows of words that more than ten questions
trained on have: those are phrases, not questions.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np

from cache_store.errors import DataError

FORMAT = 1
#: Words in a row that make two questions near-duplicates.
WORDS = 13
#: In more questions than this a row of words is a phrase.
_PHRASE = 10
#: Hashes of rows of words that are kept at most (8 bytes each).
MOST_GRAMS = 1 << 22
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ALL = (1 << 64) - 1
Likeness = Literal["same", "near"]


@dataclass(frozen=True)
class TrainedQuestions:
    """`texts`: sorted uint64 hashes of whole questions; `grams`: of their rows of 13 words, of which those up to
    `highest` are kept: all of them where there are few."""

    texts: np.ndarray
    grams: np.ndarray
    highest: int

    def likeness(self, text: str) -> Likeness | None:
        """Say whether the model was trained on this question, or on one that is near it."""
        words = _words(text)
        if _holds(self.texts, _text_hash(words)).any():
            return "same"
        return "near" if _holds(self.grams, _grams(words)).any() else None

    def __or__(self, other: TrainedQuestions) -> TrainedQuestions:
        """Return the questions of both."""
        highest = min(self.highest, other.highest)
        grams = np.union1d(self.grams, other.grams)
        return TrainedQuestions(np.union1d(self.texts, other.texts), grams[grams <= np.uint64(highest)], highest)

    def to_bytes(self) -> bytes:
        """Write the digests as a file: the same bytes for the same questions."""
        stream = io.BytesIO()
        highest = np.array([self.highest], np.uint64)
        np.savez(stream, format=np.array([FORMAT]), texts=self.texts, grams=self.grams, highest=highest)
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> TrainedQuestions:
        """Read a file of digests. DataError, with `where`, when it is none."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                version, texts, grams, highest = (found[key] for key in ("format", "texts", "grams", "highest"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{where}: holds no digests of questions: {error}") from error
        if int(version[0]) != FORMAT:
            raise DataError(f"{where}: digests of format {int(version[0])}; this version reads {FORMAT}")
        return cls(texts, grams, int(highest[0]))


def digest_questions(texts: Iterable[str], most: int = MOST_GRAMS) -> TrainedQuestions:
    """Take the digests of questions; keep at most `most` hashes of rows of words, chosen by the hashes alone."""
    whole: list[np.ndarray] = []
    counted = _Counted(most)
    for text in texts:
        words = _words(text)
        whole.append(_text_hash(words))
        counted.add(_grams(words))
    counted.merge()
    grams = counted.grams[counted.counts <= _PHRASE]
    return TrainedQuestions(np.unique(_joined(whole)), grams, counted.highest)


class _Counted:
    """Hashes with the number of questions that have each, at most `most` of them."""

    def __init__(self, most: int) -> None:
        self.highest = _ALL
        self.grams = np.empty(0, np.uint64)
        self.counts = np.empty(0, np.int64)
        self._most = most
        self._pending: list[np.ndarray] = []
        self._waiting = 0

    def add(self, grams: np.ndarray) -> None:
        self._pending.append(np.unique(grams[grams <= np.uint64(self.highest)]))
        self._waiting += len(grams)
        if self._waiting > self._most:
            self.merge()

    def merge(self) -> None:
        """Count what waits; where there is too much, keep the lower half of all hashes, until it fits."""
        found, counts = np.unique(_joined(self._pending), return_counts=True)
        grams, where = np.unique(np.concatenate([self.grams, found]), return_inverse=True)
        total = np.bincount(where, np.concatenate([self.counts, counts]), len(grams)).astype(np.int64)
        while np.count_nonzero(grams <= np.uint64(self.highest)) > self._most:
            self.highest //= 2
        kept = grams <= np.uint64(self.highest)
        self.grams, self.counts = grams[kept], total[kept]
        self._pending, self._waiting = [], 0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


@cache
def _powers() -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.cumprod(np.full(WORDS, _MULTIPLIER), dtype=np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _text_hash(words: list[str]) -> np.ndarray:
    return np.array([_hash(" ".join(words))], np.uint64)


def _grams(words: list[str]) -> np.ndarray:
    """Hash every row of 13 words; none of shorter texts, which are compared as a whole."""
    if len(words) < WORDS:
        return np.empty(0, np.uint64)
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    sums = (np.lib.stride_tricks.sliding_window_view(hashes, WORDS) * _powers()).sum(1, dtype=np.uint64)
    # Mixed, so that the lower half of the hashes is any half of the rows.
    sums = (sums ^ (sums >> np.uint64(31))) * _MULTIPLIER
    mixed: np.ndarray = sums ^ (sums >> np.uint64(29))
    return mixed


@lru_cache(1 << 18)
def _word_hash(word: str) -> int:
    return _hash(word)


def _holds(known: np.ndarray, asked: np.ndarray) -> Any:
    """Say of each hash whether it is among the sorted ones."""
    if not len(known):
        return np.zeros(len(asked), bool)
    return known[np.minimum(np.searchsorted(known, asked), len(known) - 1)] == asked


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint64), *pieces])
