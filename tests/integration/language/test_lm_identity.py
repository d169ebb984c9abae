"""What a language model's results are known by: tokenizer, chat template, companions and code, by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_running import LLAMA, TEMPLATE, lm_changes, write_chat, write_checkpoint, write_tokenizer
from running import Lab

from cache_store.errors import ConfigError
from workers.specs.data_results import TextDataResult


def swapped(folder: Path) -> Path:
    """The tokenizer of `folder` with two of its tokens exchanged: the same count, size and special tokens."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    return folder


def lab(folder: Path, model: Path, **changes: Any) -> Lab:
    settings = {**lm_changes(folder), "model": {"family": "causal_lm", "path": str(model)}, "regimes": ["e2e"]}
    return Lab.make(folder, {**settings, **changes})


def ids(found: Lab) -> dict[str, str]:
    return {node.label: node.id for node in found.prepared.plan.nodes}


def digest_of_tokens(found: Lab) -> str:
    found.run("data")
    return str(found.commit("data").read(TextDataResult).train.digest)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_two_models_on_one_store_train_on_the_tokens_of_their_own_tokenizers(model: Path, tmp_path: Path) -> None:
    other = swapped(Path(shutil.copytree(model, tmp_path / "other")))
    first, second = lab(tmp_path, model), lab(tmp_path, other)
    assert first.store == second.store
    assert ids(first)["data"] != ids(second)["data"]
    assert digest_of_tokens(first) != digest_of_tokens(second)


def test_a_trial_of_a_sweep_that_names_another_tokenizer_has_a_data_node_of_its_own(
    model: Path, tmp_path: Path
) -> None:
    other = swapped(Path(shutil.copytree(model, tmp_path / "other")))
    named = {"model.tokenizer": str(other)}
    assert ids(lab(tmp_path, model, **named))["data"] == ids(lab(tmp_path, other))["data"], "the same tokenizer"
    assert ids(lab(tmp_path, model, **named))["data"] != ids(lab(tmp_path, model))["data"]


def test_a_copy_of_a_model_is_the_same_one(model: Path, tmp_path: Path) -> None:
    before = ids(lab(tmp_path, model))
    copy = shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert ids(lab(tmp_path, Path(copy))) == before


def test_a_template_changed_under_the_same_path_makes_other_tokens_and_another_export(
    model: Path, tmp_path: Path
) -> None:
    write_chat(tmp_path / "chat.jsonl", 60)
    chat = {"data": {**lm_changes(tmp_path)["data"], "name": "chat", "path": str(tmp_path / "chat.jsonl")}}
    chat["data"]["sequence_length"] = 128
    first = lab(tmp_path, model, **chat)
    before, tokens = ids(first), digest_of_tokens(first)
    write_tokenizer(model, TEMPLATE.replace("<{{", "[{{").replace("}}>", "}}]").replace("<assistant>", "[assistant]"))
    second = lab(tmp_path, model, **chat)
    assert ids(second)["data"] != before["data"]
    assert ids(second)["model"] != before["model"], "whose companions an export copies"
    assert digest_of_tokens(second) != tokens


def test_a_tokenizer_changed_after_planning_is_refused(model: Path, tmp_path: Path) -> None:
    planned = lab(tmp_path, model)
    swapped(model)
    with pytest.raises(ConfigError, match=r"model\.tokenizer.*has changed since the run was planned"):
        planned.run("data")


def test_what_only_an_export_copies_changes_the_model_node_not_the_tokens(model: Path, tmp_path: Path) -> None:
    before = ids(lab(tmp_path, model))
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "top_k": 7}))
    after = ids(lab(tmp_path, model))
    assert after["data"] == before["data"]
    assert after["model"] != before["model"]


def test_random_weights_with_bytes_have_no_files_to_be_known_by(tmp_path: Path) -> None:
    found = Lab.make(tmp_path, {**lm_changes(tmp_path), "regimes": ["e2e"]})
    nodes = {node.label: node for node in found.prepared.plan.nodes}
    assert nodes["data"].task["tokenizer"] == "bytes-1"
    assert "companions" not in nodes["model"].task
    assert nodes["model"].task["model"]["config"]["hidden_size"] == LLAMA["hidden_size"]
