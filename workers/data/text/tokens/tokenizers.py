"""Tokenizers: the model's own or another of transformers, and one that needs no files: a token a byte."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cache_store.errors import ConfigError
from workers.data.text.corpora.base import clean
from workers.data.text.gguf_reading import quicken
from workers.specs.language import CausalLMSpec

#: Tokens of `bytes`: 0..255 the bytes, then the end of a text.
BYTE_EOS = 256
BYTE_VOCABULARY = 257


class Tokenizer(Protocol):
    """Texts to tokens. `eos` ends a document (None: it has none), `pad` fills samples up (never seen by a loss),
    `vocabulary` counts its tokens, `digest` covers everything that determines what it returns, its chat template
    included."""

    eos: int | None
    pad: int
    vocabulary: int
    digest: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the int32 tokens of each text, with those the tokenizer itself puts around one (such as a first
        BOS)."""

    def decode(self, tokens: np.ndarray) -> str:
        """Return what int32 tokens say, special ones by their names."""


class ByteTokenizer:
    """A token a byte of UTF-8, and an end of text: fits any vocabulary of 257 tokens or more."""

    eos: int | None = BYTE_EOS
    pad = BYTE_EOS
    vocabulary = BYTE_VOCABULARY
    digest = "bytes-1"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [np.frombuffer(clean(text).encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, tokens: np.ndarray) -> str:
        """See `Tokenizer`."""
        pieces = np.split(tokens, np.flatnonzero(tokens == BYTE_EOS))
        ends = ["<end of text>" if len(piece) and piece[0] == BYTE_EOS else "" for piece in pieces]
        texts = (bytes(piece[piece != BYTE_EOS].tolist()).decode(errors="replace") for piece in pieces)
        return "".join(end + text for end, text in zip(ends, texts, strict=True))


class PretrainedTokenizer:
    """A tokenizer of transformers: `tokenizer` is its own object."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad: int = next((token for token in (pad, self.eos) if token is not None), 0)
        self.vocabulary = len(tokenizer)
        self.digest = _digest(tokenizer)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`; the whole batch at once, on all threads of the fast tokenizers."""
        if not texts:
            return []
        rows = self.tokenizer(
            [clean(text) for text in texts], return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return [np.array(self._one_bos(row), np.int32) for row in rows]

    def decode(self, tokens: np.ndarray) -> str:
        """See `Tokenizer`."""
        text: str = self.tokenizer.decode(
            tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _one_bos(self, row: list[int]) -> list[int]:
        """A text may bring the token for its beginning itself; the tokenizer puts one before it all the same."""
        bos = self.tokenizer.bos_token_id
        return row[1:] if bos is not None and row[:2] == [bos, bos] else row


def load_tokenizer(model: CausalLMSpec) -> Tokenizer:
    """Load the tokenizer that `model` names: `bytes`, a folder or hub id, or the one beside its weights.

    ConfigError: it cannot be loaded, there is none, or it has more tokens than the model.
    """
    loaded: Tokenizer = ByteTokenizer() if model.tokenizer == "bytes" else PretrainedTokenizer(_load(model))
    vocabulary = setting_of(model, "vocab_size")
    if vocabulary is not None and loaded.vocabulary > vocabulary:
        raise ConfigError(
            f"model.tokenizer: {model.tokenizer or model.path} has {loaded.vocabulary} tokens, the model's vocabulary "
            f"{vocabulary}; allowed: a tokenizer of at most {vocabulary} tokens"
        )
    return loaded


def longest_sample(model: CausalLMSpec) -> int | None:
    """Return the tokens of the longest sample the model has positions for; None where its configuration does not
    say."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if (found := setting_of(model, name)) is not None:
            return found
    return None


def setting_of(model: CausalLMSpec, name: str) -> int | None:
    # Multimodal checkpoints keep their decoder's settings one level down.
    config = model.config or {}
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, Mapping) else {}):
        if isinstance(place.get(name), int):
            return int(place[name])
    return None


def _load(model: CausalLMSpec) -> Any:
    source = model.tokenizer or model.path
    if source is None:
        raise ConfigError(
            "model.tokenizer: none given, and the model has no path; allowed: a folder, a hub id, or bytes"
        )
    own = model.tokenizer is None
    local = os.path.expanduser(source)
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if own and model.gguf is not None:
        options["gguf_file"] = model.gguf
    if own and model.revision is not None and not os.path.isdir(local):
        options["revision"] = model.revision
    try:
        if "gguf_file" in options:
            quicken()
        return AutoTokenizer.from_pretrained(local if os.path.isdir(local) else source, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        # transformers reports a missing, gated, foreign or damaged tokenizer as any of these.
        what = f"{source}/{model.gguf}" if own and model.gguf else source
        raise ConfigError(
            f"model.tokenizer: cannot load a tokenizer from {what}: {error}; allowed: a folder with a tokenizer.json, "
            "a hub id with its revision, or bytes"
        ) from error


def _digest(tokenizer: Any) -> str:
    """By content, wherever it was loaded from: vocabulary, merges, rules, special tokens and chat template."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(backend.to_str().encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            for path in sorted(map(Path, tokenizer.save_vocabulary(folder))):
                digest.update(path.name.encode() + path.read_bytes())
        # Settings such as `do_lower_case` are in no file of the vocabulary.
        settings = {
            name: value for name, value in tokenizer.init_kwargs.items() if not name.endswith(("_file", "_path"))
        }
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if type(tokenizer).__module__.startswith("transformers_modules"):
        # Code that came with the tokenizer.
        digest.update(inspect.getsource(inspect.getmodule(type(tokenizer)) or type(tokenizer)).encode())
    special = [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.special_tokens_map]
    digest.update(json.dumps([special, tokenizer.chat_template, len(tokenizer)], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]
