"""Small real runs of language models for the tests: a random Llama of a few narrow layers, a token a byte."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from running import Lab
from safetensors.torch import load_file

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    # transformers' own 0.02 leaves a model this narrow nearly linear: parts could be swapped unnoticed.
    "initializer_range": 0.2,
}

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_WORDS = (
    *("a", "be", "can", "do", "every", "few", "good", "head", "is", "just", "kept", "layer"),
    *("more", "no", "one", "part", "read", "some", "then", "under", "very", "what"),
)


def lm_changes(folder: Path) -> dict[str, Any]:
    """Changes that make `running.TINY` a language model's; the text is written into `folder`, once."""
    text = folder / "text.jsonl"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(text, 240)
    return {
        "model": {"family": "causal_lm", "tokenizer": "bytes", "config": LLAMA},
        "data": {
            "name": "text",
            "path": str(text),
            "sequence_length": 32,
            "validation": 12,
            "test": 12,
            "train_limit": 32,
            "validation_limit": 12,
            "test_limit": 12,
        },
        "training": {"epochs": 1, "batch_size": 8, "commit": "last", "optimizer": {"lr": 1e-2}},
        "split": {"base": 1, "head": 1},
        # Sets of several shards, of several groups each.
        "snapshots": {"group_rows": 4, "shard_bytes": 40_000},
    }


def write_text(path: Path, documents: int, seed: int = 0) -> None:
    """JSON lines of documents of 2 to 14 words: 8 to about 60 bytes."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": _sentence(draw, 2, 14)}) + "\n")


def write_chat(path: Path, records: int, seed: int = 0) -> None:
    """JSON lines of questions with answers of very different lengths."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(records):
            answer = _sentence(draw, 1, 2 if number % 2 else 9)
            messages = [{"role": "user", "content": _sentence(draw, 1, 4)}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def _sentence(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(least, most)))


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A fast tokenizer of 257 tokens (a byte each, and an end), as `save_pretrained` leaves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab={**vocabulary, "<|end|>": len(vocabulary)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, *, tied: bool = False, seed: int = 0, shards: str = "5GB", **config: Any) -> Path:
    """A random Llama with the tokenizer above, as transformers itself saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**values, **config, "tie_word_embeddings": tied}))
    model.save_pretrained(folder, max_shard_size=shards)
    return write_tokenizer(folder)


def imported(lab: Lab) -> dict[str, torch.Tensor]:
    """Every tensor the model node committed, by the checkpoint's own names."""
    commit = lab.commit("model")
    return {
        name: tensor
        for part in commit.result["parts"]
        for name, tensor in load_file(Path(lab.store) / commit.files[f"{part}.safetensors"].path).items()
    }


def plain_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`<part>/<name>` without the part: the names of the whole model's state dict."""
    return {name.partition("/")[2]: tensor for name, tensor in weights.items()}
