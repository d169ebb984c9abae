"""Texts and pairs of texts to tokens, as a tokenizer of transformers does for classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cache_store.keys import digest_json
from workers.data.text.tokens.tokenizers import PretrainedTokenizer, Tokenizer, setting_of
from workers.specs.language import CausalLMSpec

Texts = tuple[str, str | None]
_TYPES = "token_type_ids"


class PairEncoder:
    """Encodes for one model. `pad`: the token that fills batches up, which is the model's where it names one; `digest`
    covers everything that determines the tokens."""

    def __init__(self, tokenizer: Tokenizer, model: CausalLMSpec) -> None:
        self._tokenizer = tokenizer
        # Some models have no number for a second text, and some tokenizers do not say which one a token is of: whoever
        # uses the exported model with its tokenizer will not give it types then.
        names = tokenizer.tokenizer.model_input_names if isinstance(tokenizer, PretrainedTokenizer) else (_TYPES,)
        self._typed = _TYPES in names and (setting_of(model, "type_vocab_size") or 0) > 1
        padding = setting_of(model, "pad_token_id")
        self.pad = tokenizer.pad if padding is None or padding < 0 else padding
        self.vocabulary = tokenizer.vocabulary
        self.digest = digest_json([tokenizer.digest, self._typed])

    def encode(self, texts: Sequence[Texts], longest: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (tokens int32, types uint8) of every text or pair; `longest`: cut to so many tokens, of a pair the
        longer text."""
        if not texts:
            return []
        if isinstance(self._tokenizer, PretrainedTokenizer):
            return self._pretrained(self._tokenizer.tokenizer, texts, longest)
        return [self._plain(pair, longest) for pair in texts]

    def _pretrained(
        self, tokenizer: Any, texts: Sequence[Texts], longest: int | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        firsts = [text for text, _ in texts]
        paired = texts[0][1] is not None
        cut = {} if longest is None else {"truncation": "longest_first", "max_length": longest}
        found = tokenizer(
            firsts,
            [pair for _, pair in texts] if paired else None,
            return_attention_mask=False,
            return_token_type_ids=self._typed,
            verbose=False,
            **cut,
        )
        ids = found["input_ids"]
        types = found.get(_TYPES)
        return [
            (
                np.array(row, np.int32),
                np.zeros(len(row), np.uint8) if types is None else np.array(types[index], np.uint8),
            )
            for index, row in enumerate(ids)
        ]

    def _plain(self, pair: Texts, longest: int | None) -> tuple[np.ndarray, np.ndarray]:
        """A tokenizer that puts nothing around texts: the second begins with the token that ends a text."""
        pieces = self._tokenizer.encode([text for text in pair if text is not None])
        if len(pieces) > 1:
            pieces = [pieces[0], np.concatenate([np.array([self._tokenizer.eos], np.int32), pieces[1]])]
        tokens = np.concatenate(pieces)
        types = np.repeat(np.arange(len(pieces), dtype=np.uint8), [len(piece) for piece in pieces])
        return tokens[:longest], (types if self._typed else np.zeros_like(types))[:longest]
