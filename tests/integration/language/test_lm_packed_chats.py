"""Chats packed into one sample do not see each other: losses are those of the chats alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_running import LLAMA, lm_changes, write_chat, write_tokenizer
from running import Lab


def test_a_model_scores_packed_chats_as_it_scores_them_alone(tmp_path: Path) -> None:
    write_chat(tmp_path / "chat.jsonl", 120)
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    found = {}
    for case, pack, isolate in (("alone", "auto", True), ("packed", True, True), ("seeing each other", True, False)):
        changes = {
            **lm_changes(tmp_path),
            "regimes": ["e2e"],
            "model": {"family": "causal_lm", "tokenizer": tokenizer, "config": LLAMA},
            # No weight moves.
            "training": {"epochs": 1, "batch_size": 4, "commit": "last", "optimizer": {"lr": 1e-30}},
            "data": {
                "name": "chat",
                "path": str(tmp_path / "chat.jsonl"),
                "sequence_length": 128,
                "validation": 40,
                "test": 6,
                "pack": pack,
                "isolate": isolate,
            },
        }
        folder = tmp_path / case.replace(" ", "_")
        folder.mkdir()
        commit = Lab.make(folder, changes).run("e2e/e2e")
        found[case] = commit.result["epochs"][0]["validation"]
    assert found["packed"]["loss"] == pytest.approx(found["alone"]["loss"], rel=1e-5)
    assert found["packed"]["accuracy"] == pytest.approx(found["alone"]["accuracy"])
    assert abs(found["seeing each other"]["loss"] - found["alone"]["loss"]) > 1e-3
