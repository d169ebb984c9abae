"""The three real sources with SmolLM2's own tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_makers import BYTES, mmlu_training, samples_of, shared, smollm, source_of, store

from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.tokens.tokenizers import PretrainedTokenizer, load_tokenizer
from workers.specs.language import CausalLMSpec, TextSpec


@pytest.fixture(scope="module")
def model() -> CausalLMSpec:
    return smollm()


@pytest.fixture(scope="module")
def tokenizer(model: CausalLMSpec) -> Iterator[Any]:
    loaded = load_tokenizer(model)
    assert isinstance(loaded, PretrainedTokenizer)
    return loaded.tokenizer


def test_the_whole_standard_library_packs_into_full_samples() -> None:
    data = TextSpec(name="stdlib", sequence_length=512, validation=6, test=6, train_limit=300)
    outline = inspect_text(data)
    snapshots = store()
    result = prepare_text(data, BYTES, 0, snapshots, fingerprint=outline.fingerprint)
    train = source_of(data, BYTES, "train", snapshots, 0, result)
    assert train.rows == outline.rows["train"] == 300
    assert set(np.diff(train.offsets).tolist()) <= {512, int(train.offsets[-1] - train.offsets[-2])}
    batch = train.batch(np.arange(8))
    assert batch.attention_mask is None
    assert batch.position_ids.max() < 512
    assert (batch.position_ids == 0).sum() >= 8


def test_packed_modules_decode_to_what_their_files_say(model: CausalLMSpec, tokenizer: Any) -> None:
    package = Path(asyncio.__file__).parent
    data = TextSpec(name="text", path=str(package), include=("*.py",), sequence_length=256, validation=6, test=6)
    outline = inspect_text(data)
    snapshots = store()
    result = prepare_text(data, model, 0, snapshots, fingerprint=outline.fingerprint)
    assert 0.5 < outline.rows["train"] / result.rows["train"] < 2
    modules = {path.read_text(encoding="utf-8") for path in package.glob("*.py")}
    found = []
    for split in ("train", "validation", "test"):
        stream = [t for ids, _, _ in samples_of(source_of(data, model, split, snapshots, 0, result)) for t in ids]
        *documents, rest = np.split(np.array(stream), np.flatnonzero(np.array(stream) == tokenizer.eos_token_id) + 1)
        assert not len(rest)
        found += [tokenizer.decode(ids[:-1].tolist()) for ids in documents]
    assert len(found) == len(modules) > 20
    assert set(found) == modules


@pytest.mark.parametrize("name", ["mmlu", "winogrande"])
def test_real_questions_end_in_their_answers(model: CausalLMSpec, tokenizer: Any, name: str, tmp_path: Path) -> None:
    path = shared(name)
    if name == "mmlu":
        # Its training questions are too many to keep beside the project: real ones of dev and test, made ones to train.
        for split in ("dev", "test"):
            (tmp_path / split).symlink_to(Path(path) / split)
        path = mmlu_training(tmp_path, 60)
    data = TextSpec(
        name=name,  # type: ignore[arg-type]
        path=path,
        subset="anatomy" if name == "mmlu" else "xs",
        shots=2,
        validation=20,
        test=20,
        validation_limit=10,
        test_limit=10,
        overlong="refuse",
    )
    snapshots = store()
    result = prepare_text(data, model, 0, snapshots)
    candidates = {"mmlu": 4, "winogrande": 2}[name]
    assert result.rows["validation"] == result.rows["test"] == 10 * candidates
    source = source_of(data, model, "test", snapshots, 0, result)
    assert source.groups is not None
    group, correct = source.groups
    assert np.bincount(group).tolist() == [candidates] * 10
    assert np.bincount(group, correct).tolist() == [1] * 10
    for row, (ids, _, counted) in enumerate(samples_of(source)):
        text, answer = tokenizer.decode(ids), tokenizer.decode([ids[i] for i in counted])
        assert text.endswith(answer)
        assert answer.startswith(" ")
        if name == "mmlu":
            assert answer == " " + "ABCD"[row % 4]
            assert text.startswith("The following are multiple choice questions (with answers) about anatomy.\n\n")
            assert text.count("\nAnswer:") == 3
        else:
            assert text.count("\n\n") == 2
