"""`segprop data show`: the first samples as training sees them, without a store."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from lm_running import lm_changes, write_chat, write_tokenizer
from running import write_config

from orchestrator.cli import main
from orchestrator.runs import data_show
from workers.data.text.preview import preview_text
from workers.specs.language import CausalLMSpec, TextSpec


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def chat_config(folder: Path) -> Path:
    write_tokenizer(folder / "tokenizer")
    write_chat(folder / "chat.jsonl", 40)
    changes = lm_changes(folder)
    changes["model"] = {**changes["model"], "tokenizer": str(folder / "tokenizer")}
    changes["data"] = {
        "name": "chat",
        "path": str(folder / "chat.jsonl"),
        "sequence_length": 128,
        "validation": 6,
        "test": 6,
    }
    return write_config(folder, changes)


def test_samples_are_shown_with_what_counts_between_marks_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chat_config(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["data", "show", str(config), "--rows", "2", "--tokens"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("train: 28 documents. ⟦Targets⟧ are what the loss counts.\n")
    found = preview_text(
        TextSpec(name="chat", path=str(tmp_path / "chat.jsonl"), sequence_length=128, validation=6, test=6),
        CausalLMSpec(family="causal_lm", tokenizer=str(tmp_path / "tokenizer")),
        0,
        "train",
        2,
    )
    assert len(found.samples) == 2
    rows = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    for sample in found.samples:
        question, answer = rows[int(sample.where.split()[1])]
        prompt = f"<user> {question['content']}<|end|><assistant> "
        assert [(run.text, run.target) for run in sample.runs] == [
            (prompt, False),
            (answer["content"] + "<|end|>", True),
        ]
        assert f"{prompt}⟦{answer['content']}<|end|>⟧\n" in output
        assert f"{sample.where}, {sample.tokens} tokens, {len(answer['content']) + 1} targets" in output
        assert " ".join(map(str, sample.runs[1].tokens)) in output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_targets_are_in_colour_on_a_terminal(tmp_path: Path) -> None:
    chat_config(tmp_path)
    found = preview_text(
        TextSpec(name="chat", path=str(tmp_path / "chat.jsonl"), sequence_length=16, validation=6, test=6),
        CausalLMSpec(family="causal_lm", tokenizer=str(tmp_path / "tokenizer")),
        0,
        "train",
        1,
    )
    stream = Terminal()
    data_show.show(found, "train", stream=stream)
    assert "\x1b[" in stream.getvalue()
    assert "⟦" not in stream.getvalue()
    assert f"({found.samples[0].cut} more are cut off: data.sequence_length)" in stream.getvalue()
    assert found.samples[0].tokens == 16


def test_rows_that_cannot_be_used_and_what_cannot_be_shown_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = chat_config(tmp_path)
    lines = (tmp_path / "chat.jsonl").read_text().replace('"user"', '"narrator"')
    (tmp_path / "chat.jsonl").write_text(lines)
    assert main(["data", "show", str(config), "data.bad=skip", "--rows", "2"]) == 0
    assert capsys.readouterr().out.count("Cannot be used: row ") == 2
    assert main(["data", "show", str(config), "--split", "tset"]) == 2
    assert "--split: 'tset'; allowed: train, validation, test" in capsys.readouterr().err
    text = write_config(tmp_path, lm_changes(tmp_path))
    assert main(["data", "show", str(text), "--split", "validation", "--rows", "1"]) == 0
    output = capsys.readouterr().out
    assert "<end of text>⟧" in output
    assert "documents are joined into samples of 32 tokens" in output
    images = write_config(tmp_path, {})
    assert main(["data", "show", str(images)]) == 2
    assert "data show is for text, which people can read; data.name digits is images" in capsys.readouterr().err
