"""The settings of a language model whose stages hold hundreds of MB."""

from __future__ import annotations

from typing import Any

# 32 M parameters: a stage holds hundreds of MB, beside which the rest of a process does not count.
LANGUAGE: dict[str, Any] = {
    "model": {
        "family": "causal_lm",
        "tokenizer": "bytes",
        "config": {
            "model_type": "llama",
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 8192,
            "max_position_embeddings": 512,
        },
    },
    "data": {"name": "stdlib", "sequence_length": 64, "train_limit": 16, "validation_limit": 1, "test_limit": 1},
    "split": {"base": 4, "head": 1, "train_base": False},
    "training": {"epochs": 1, "batch_size": 8, "clip": 1.0},
    "snapshots": {},
    "evaluation": {"stages": False},
    "regimes": ["e2e", "segprop"],
}
