"""Texts to tokens such that spans of characters are whole tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

#: Where a span begins and ends in a text, in characters.
Span = tuple[int, int]


class ExactTokens:
    """Tokenizes with a fast tokenizer of transformers, its own special tokens around a text left out.

    Where a token would cross the edge of a span, as byte-pair encodings do that merge over it, the text is tokenized
    apart at that edge. This is what a model meets: it is given the tokens of the prompt alone and goes on from there.
    """

    def __init__(self, tokenizer: Any) -> None:
        # Post-processors trim spaces off the offsets, which would hide that a token crosses an edge.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added = np.array(sorted(tokenizer.added_tokens_decoder), np.int64)
        self._newline = self._backend.encode("\n", add_special_tokens=False).ids

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the int32 tokens of each text, and bool: this token lies in one of its spans (ascending, not
        overlapping)."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        result = []
        for text, own, encoding in zip(texts, spans, encodings, strict=True):
            tokens = np.array(encoding.ids, np.int64)
            places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            edges = self._moved(text, np.array(own, np.int64).reshape(-1, 2), tokens, places)
            cuts = np.empty(0, np.int64)
            # Cut at one edge, a text may merge over the next.
            while len(crossed := np.setdiff1d(_crossed(edges, places), cuts)):
                cuts = np.union1d(cuts, crossed)
                tokens, places = self._apart(text, cuts)
            result.append((tokens.astype(np.int32), _inside(edges, places)))
        return result

    def _moved(self, text: str, spans: np.ndarray, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the spans, with edges moved to the end of an added token that takes the blanks behind it with it."""
        spans = spans.copy()
        added = np.isin(tokens, self._added)
        for index, edge in np.ndenumerate(spans):
            over = np.flatnonzero(added & (places[:, 0] < edge) & (edge < places[:, 1]))
            if len(over) and text[edge : places[over[0], 1]].isspace():
                spans[index] = places[over[0], 1]
        return spans

    def _apart(self, text: str, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and places of a text cut at these characters."""
        tokens: list[int] = []
        places: list[tuple[int, int]] = []
        ends = [0, *cuts.tolist(), len(text)]
        for start, stop in itertools.pairwise(ends):
            own, offsets = self._piece(text[start:stop], first=start == 0)
            tokens += own
            places += [(start + begin, start + end) for begin, end in offsets]
        return np.array(tokens, np.int64), np.array(places, np.int64).reshape(-1, 2)

    def _piece(self, text: str, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return tokens and offsets of a piece. It is tokenized behind a line break, which is taken off again: some
        tokenizers put a space before the first character of all that they are given."""
        skip = len(self._newline)
        if not first:
            found = self._backend.encode("\n" + text, add_special_tokens=False)
            if found.ids[:skip] == self._newline and all(begin for begin, _ in found.offsets[skip:]):
                return found.ids[skip:], [(begin - 1, end - 1) for begin, end in found.offsets[skip:]]
        found = self._backend.encode(text, add_special_tokens=False)
        return found.ids, found.offsets


def _crossed(edges: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Find the edges (ascending, once each) that lie inside a token."""
    cuts = np.unique(edges)
    # Tokens of one character's bytes share its place, so starts ascend but need not be different.
    token = np.searchsorted(places[:, 0], cuts, side="left") - 1
    inside = (token >= 0) & (cuts < places[token, 1]) if len(places) else np.zeros(len(cuts), bool)
    crossed: np.ndarray = cuts[inside]
    return crossed


def _inside(spans: np.ndarray, places: np.ndarray) -> np.ndarray:
    inside = np.zeros(len(places), bool)
    for start, stop in spans.tolist():
        inside |= (places[:, 0] >= start) & (places[:, 1] <= stop) & (places[:, 0] < stop)
    return inside
