"""GGUF files: the converter that is named is run, and only what it made whole is kept."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import gguf_file

from cache_store.errors import SegpropError, UserError
from orchestrator.exports.gguf import SCRIPT, convert, converter

STAND_IN = """
import sys, pathlib
folder, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
pathlib.Path(options["--outfile"]).write_text(f"{folder} {options['--outtype']}")
if "bad" in folder:
    print("loading", "NotImplementedError: unknown", sep=chr(10))
    sys.exit(1)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "llama.cpp").mkdir()
    path = tmp_path / "llama.cpp" / SCRIPT
    path.write_text(STAND_IN)
    return path


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_checkout_or_its_script_is_the_converter_and_nothing_else_is(script: Path, tmp_path: Path) -> None:
    assert converter(script.parent) == converter(script) == script
    for place in (tmp_path, tmp_path / "absent.py"):
        with pytest.raises(UserError, match=r"there is no such file; give a checkout of llama\.cpp"):
            converter(place)
    with pytest.raises(UserError, match="--gguf-type: q9: is none; allowed: auto, f32"):
        converter(script, "q9")


def test_what_the_converter_made_is_put_in_place_whole(script: Path, tmp_path: Path) -> None:
    folder, target = model(tmp_path / "m"), tmp_path / "gguf" / "m.gguf"
    convert(script, folder, target, "f16")
    assert target.read_text() == f"{folder} f16"
    assert list(target.parent.iterdir()) == [target]


def test_where_the_converter_fails_its_last_words_are_told_and_nothing_is_left(script: Path, tmp_path: Path) -> None:
    folder, target = model(tmp_path / "bad"), tmp_path / "gguf" / "m.gguf"
    with pytest.raises(SegpropError, match=r"failed on .*bad \(1\): loading / NotImplementedError: unknown"):
        convert(script, folder, target, "auto")
    assert list(target.parent.iterdir()) == []
    target.write_text("an earlier one")
    with pytest.raises(SegpropError):
        convert(script, folder, target, "auto")
    assert target.read_text() == "an earlier one"
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is no language model of transformers"):
        convert(script, folder, target, "auto")


def checkout() -> str:
    """A checkout of llama.cpp, or its script, that `SEGPROP_LLAMA_CPP` names; "" without one that could be run."""
    path = os.environ.get("SEGPROP_LLAMA_CPP", "")
    return path if path and importlib.util.find_spec("sentencepiece") is not None else ""


@pytest.mark.skipif(not checkout(), reason="SEGPROP_LLAMA_CPP names no checkout of llama.cpp, or no sentencepiece here")
def test_the_real_converter_keeps_every_logit(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # The converter takes only tokenizers that it knows.
    real: Any = AutoTokenizer
    tokenizer = real.from_pretrained(gguf_file().parent, gguf_file=gguf_file().name)
    tokenizer.save_pretrained(tmp_path / "m")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "m")
    convert(converter(Path(checkout())), tmp_path / "m", tmp_path / "m.gguf", "f32")
    loader: Any = AutoModelForCausalLM
    models = loader.from_pretrained(tmp_path / "m"), loader.from_pretrained(tmp_path, gguf_file="m.gguf")
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        first, second = (each.eval()(ids).logits for each in models)
    assert torch.equal(first, second)
