"""A tiny random Llama with a tokenizer of one token a byte, as a model folder: for tests that need the shape only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, **{letter: index for index, letter in enumerate(alphabet, 1)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", bos_token="<end>", pad_token="<end>")


def model(seed: int = 0, positions: int = 2048) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config).eval()
    # Random weights of the usual size answer almost alike; larger ones have preferences.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def write_folder(folder: Path, seed: int = 0) -> Path:
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
