"""What can be wrong with a language model's run: named before anything starts, and all at once."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_running import LLAMA, lm_changes, write_chat, write_checkpoint, write_tokenizer
from running import write_config

from orchestrator.cli import main
from orchestrator.runs import session

Changes = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In two shards or more."""
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", shards="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def missing_model(folder: Path) -> Changes:
    return {"model": {"family": "causal_lm", "path": str(folder / "nowhere")}}


def missing_shard(folder: Path) -> Changes:
    sorted((folder / "model").glob("model-*.safetensors"))[1].unlink()
    return {}


def truncated_shard(folder: Path) -> Changes:
    shard = sorted((folder / "model").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return {}


def no_weights(folder: Path) -> Changes:
    for file in (folder / "model").glob("model*"):
        file.unlink()
    return {}


def damaged_config(folder: Path) -> Changes:
    (folder / "model" / "config.json").write_text('{"model_type": "lla')
    return {}


def another_shape(folder: Path) -> Changes:
    return {"model.config": {"intermediate_size": 48}}


def no_decoder(folder: Path) -> Changes:
    return {"model": {"family": "causal_lm", "tokenizer": "bytes", "config": {"model_type": "vit"}}}


def no_tokenizer(folder: Path) -> Changes:
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()
    return {}


def no_tokenizer_named(folder: Path) -> Changes:
    return {"model": {"family": "causal_lm", "config": LLAMA}}


def no_chat_template(folder: Path) -> Changes:
    shutil.rmtree(folder / "model", ignore_errors=True)
    write_checkpoint(folder / "model")
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    write_tokenizer(folder / "model", template=None)
    write_chat(folder / "chat.jsonl", 40)
    return {"data.name": "chat", "data.path": str(folder / "chat.jsonl")}


def small_vocabulary(folder: Path) -> Changes:
    return {"model": {"family": "causal_lm", "tokenizer": "bytes", "config": {**LLAMA, "vocab_size": 200}}}


def empty_data(folder: Path) -> Changes:
    (folder / "empty.jsonl").write_text("")
    return {"data.path": str(folder / "empty.jsonl")}


def no_data(folder: Path) -> Changes:
    return {"data.path": str(folder / "nothing.jsonl")}


def another_column(folder: Path) -> Changes:
    return {"data.column": "txet"}


def beyond_positions(folder: Path) -> Changes:
    return {"data.sequence_length": 129}


def beyond_the_layers(folder: Path) -> Changes:
    return {"split": {"base": 3, "head": 1}}


def beyond_what_is_left(folder: Path) -> Changes:
    return {"model.prune": [0], "split": {"base": 2, "head": 1}}


def omitted_layer_unknown(folder: Path) -> Changes:
    return {"split.omit": [3]}


def pruned_layer_unknown(folder: Path) -> Changes:
    return {"model.prune": [7]}


def documents_that_leak(folder: Path) -> Changes:
    recurrent = {**LLAMA, "model_type": "recurrent_gemma", "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8}
    return {"model": {"family": "causal_lm", "tokenizer": "bytes", "config": recurrent}}


def adapters_nowhere(folder: Path) -> Changes:
    return {"regimes": ["lw"], "training.lora": {"rank": 2}}


def head_adapter_without_adapters(folder: Path) -> Changes:
    return {"training.lm_head": "lora"}


def write_rows(folder: Path, change: Callable[[int, dict[str, Any]], Any]) -> Changes:
    """Chats, of which each is changed."""
    write_chat(folder / "chat.jsonl", 40)
    rows = [json.loads(line) for line in (folder / "chat.jsonl").read_text().splitlines()]
    lines = [change(number, row) for number, row in enumerate(rows)]
    (folder / "chat.jsonl").write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return {"data": {"name": "chat", "path": str(folder / "chat.jsonl"), "sequence_length": 64}}


def strange_role(folder: Path) -> Changes:
    said = {"role": "narrator", "content": "Once."}
    return write_rows(folder, lambda i, row: {"messages": [said, *row["messages"]]} if i == 12 else row)


def unwritten_call(folder: Path) -> Changes:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    return write_rows(folder, lambda i, row: {"messages": [*row["messages"], call]} if i == 12 else row)


def no_assistant(folder: Path) -> Changes:
    return write_rows(folder, lambda i, row: {"messages": row["messages"][:1]})


def broken_line(folder: Path) -> Changes:
    return write_rows(folder, lambda i, row: json.dumps(row)[:-5] if i == 39 else row)


def adapters_misspelled(folder: Path) -> Changes:
    return {"training.lora": {"rank": 2, "targets": ["q_projj"]}}


CASES: list[tuple[Callable[[Path], Changes], str, str]] = [
    (missing_model, "model.path", "nowhere"),
    (missing_shard, "model.path", "model-00002"),
    (truncated_shard, "model.path", "model-00002"),
    (no_weights, "model.path", "no weights"),
    (damaged_config, "model.path", "config.json"),
    (another_shape, "model", "gate_proj"),
    (no_decoder, "model", "vit"),
    (no_tokenizer, "model.tokenizer", "tokenizer"),
    (no_tokenizer_named, "model.tokenizer", "bytes"),
    (no_chat_template, "model.tokenizer", "chat template"),
    (small_vocabulary, "model.tokenizer", "at most 200"),
    (empty_data, "data.path", "empty"),
    (no_data, "data.path", "nothing.jsonl"),
    (another_column, "data.column", "text"),
    (beyond_positions, "data.sequence_length", "128 positions"),
    (beyond_the_layers, "split.head", "with split.base 3 at most 0"),
    (beyond_what_is_left, "split.head", "with split.base 2 at most 0"),
    (omitted_layer_unknown, "split.omit", "layers 0 to 2"),
    (pruned_layer_unknown, "model.prune", "0-2"),
    (documents_that_leak, "data.isolate", "recurrent_gemma with model.attention sdpa does not keep packed"),
    (adapters_nowhere, "training.lora", "lm_head"),
    (strange_role, "data", "row 12 of"),
    (strange_role, "data", "has the role 'narrator'"),
    (unwritten_call, "data", "does not write the tool_calls of message 2"),
    (no_assistant, "data", "(and 35 more rows of this file); data.bad: skip leaves such rows out"),
    (broken_line, "data", "not JSON in line 40"),
    (adapters_misspelled, "training.lora.targets", "no linear layer is called 'q_projj'; did you mean 'q_proj'?"),
    (head_adapter_without_adapters, "training.lm_head", "training.lora"),
]


@pytest.mark.parametrize(("spoil", "key", "hint"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_bad_input_ends_with_code_2_and_its_key_before_anything_starts(
    checkpoint: Path,
    tmp_path: Path,
    spoil: Callable[[Path], Changes],
    key: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    base = {**lm_changes(tmp_path), "model": {"family": "causal_lm", "path": str(tmp_path / "model")}}
    config = write_config(tmp_path, {**base, **spoil(tmp_path)})

    def refuse(prepared: Any) -> None:
        raise AssertionError("a runner was started")

    monkeypatch.setattr(session, "make_runner", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["run", str(config), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert [line for line in error.splitlines() if key in line and hint in line], error
    assert not (tmp_path / "run").exists()


def test_data_that_lost_most_of_their_samples_are_refused_by_run_and_then_by_plan_unless_that_is_allowed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = (
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}] for text in ("x", "x" * 90)
    )
    rows = [long if number % 3 else short for number in range(48)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    data = {"name": "chat", "path": str(tmp_path / "chat.jsonl"), "sequence_length": 64, "validation": 6, "test": 6}
    changes = {**lm_changes(tmp_path), "model": {"family": "causal_lm", "path": str(checkpoint)}, "regimes": ["e2e"]}
    config = write_config(tmp_path, {**changes, "data": data})
    refused = "32 of 48 samples (66.7 %) are longer than data.sequence_length 64 and were cut; allowed: a larger"
    assert main(["run", str(config)]) == 2
    assert refused in capsys.readouterr().err
    assert main(["run", str(config), "data.allow_loss=true", "--quiet"]) == 0
    warning = "data: 32 of 48 samples (66.7 %) are longer than data.sequence_length 64 and were cut"
    assert warning in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert sum(split["cut"] for split in summary["data"]["splits"].values()) == 32
    assert f"Warning: {warning}." in (tmp_path / "run" / "report.html").read_text()
    # What is prepared already is known without a run.
    assert main(["plan", str(config), "data.allow_loss=true"]) == 0
    output = capsys.readouterr().out
    assert "Data, prepared already: train 1" in output
    assert f"Warning: {warning}." in output
    assert main(["plan", str(config)]) == 2
    error = capsys.readouterr().err
    assert re.search(r"line \d+: data\.sequence_length: 32 of 48", error)
    assert refused in error


def test_several_problems_are_reported_together(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "empty.jsonl").write_text(json.dumps({"title": "no text here"}) + "\n")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    changes = {
        **lm_changes(tmp_path),
        "model": {"family": "causal_lm", "path": str(tmp_path / "model")},
        "data.path": str(tmp_path / "empty.jsonl"),
        "data.sequence_length": 4096,
        "split": {"base": 3, "head": 2, "omit": [1]},
        "training.lm_head": "lora",
    }
    assert main(["run", str(write_config(tmp_path, changes)), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "5 problems" in error, error
    for key in ("model.tokenizer", "data.column", "data.sequence_length", "split.head", "training.lm_head"):
        assert key in error, f"{key} is not reported:\n{error}"


def test_a_checkpoint_without_weights_can_be_planned_for(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(checkpoint / "config.json", tmp_path / "model")
    changes = {**lm_changes(tmp_path), "model": {"family": "causal_lm", "path": str(tmp_path / "model")}}
    assert main(["run", str(write_config(tmp_path, changes)), "--dry-run"]) == 0
    assert "stage2-layer1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "package"),
    [
        ("training.optimizer.name", "adamw8bit", "bitsandbytes"),
        ("training.frozen_weights", "int8", "bitsandbytes"),
        ("training.optimizer.name", "adamw4bit", "torchao"),
    ],
)
def test_few_bits_without_their_package_are_refused(
    tmp_path: Path,
    key: str,
    value: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What Python itself takes for: there is no such package.
    monkeypatch.setitem(sys.modules, package, None)
    config = write_config(tmp_path, {**lm_changes(tmp_path), key: value})
    assert main(["run", str(config), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert [line for line in error.splitlines() if key in line and package in line], error
    assert not (tmp_path / "run").exists()


def test_images_have_no_frozen_layers_in_few_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, {"training.frozen_weights": "nf4"})
    assert main(["run", str(config), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "training.frozen_weights" in error
    assert "is for language models" in error
