"""`segprop generate`: an exported model answers as transformers' own generation does."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import write_checkpoint, write_tokenizer

from orchestrator import generating
from orchestrator.cli import main
from workers.judge.answering import Sampling

SHORT = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "model" / "segprop")


def plain(folder: Path, text: str, new: int = 12) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        # Without a mask transformers takes the template's ends of turns for padding.
        every = {"attention_mask": torch.ones_like(tokens), "pad_token_id": tokenizer.eos_token_id}
        found = loaded.generate(tokens, max_new_tokens=new, do_sample=False, **every)
    return str(tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True))


def rendered(folder: Path, *messages: dict[str, str]) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def test_a_prompt_goes_through_the_template_and_raw_text_does_not(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"role": "user", "content": "What is a segment?"}
    # A run directory with one model stands for it.
    assert main(["generate", str(model.parents[1]), asked["content"], "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == plain(model, rendered(model, asked)) + "\n"
    assert main(["generate", str(model), asked["content"], "--max-tokens", "12", "--raw"]) == 0
    assert capsys.readouterr().out == plain(model, asked["content"]) + "\n"


def test_lines_are_one_conversation(model: Path) -> None:
    out = io.StringIO()
    generating.generate(model, None, SHORT, system="Be brief.", given=io.StringIO("one\n\ntwo\n"), out=out)
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}
    answer = plain(model, rendered(model, system, first))
    said = {"role": "assistant", "content": answer}
    second = plain(model, rendered(model, system, first, said, {"role": "user", "content": "two"}))
    assert out.getvalue() == f"{answer}\n{second}\n"


def test_a_seed_draws_the_same_and_another_seed_something_else(model: Path) -> None:
    def drawn(seed: int) -> str:
        out = io.StringIO()
        generating.generate(model, "one", Sampling(24, 1.0, seed), out=out)
        return out.getvalue()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_bad_input_is_named_before_a_model_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "two" / "model" / "e2e")
    shutil.copytree(model, tmp_path / "two" / "model" / "segprop")
    for arguments, words in (
        ([str(tmp_path / "two"), "x"], "has 2 models, name one"),
        ([str(tmp_path), "x"], "no config.json"),
        ([str(tmp_path / "none"), "x"], "no such folder"),
        ([str(model), "x", "--max-tokens", "0"], "--max-tokens"),
        ([str(model), "x", "--temperature", "-1"], "--temperature"),
        ([str(model), "x", "--temperature", "nan"], "--temperature"),
        ([str(model), "x", "--raw", "--system", "s"], "--system"),
        ([str(model), "x", "--dtype", "float61"], "dtype"),
        ([str(model), ""], "no tokens"),
        ([str(model), "x" * 5000], "the model reads"),
    ):
        more = ["--raw"] if not arguments[1] else []
        assert main(["generate", *arguments, *more]) == 2, arguments
        assert words in capsys.readouterr().err


def test_a_model_without_a_template_continues_text_and_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    write_tokenizer(bare, None)
    assert main(["generate", str(bare), "one", "--max-tokens", "12"]) == 0
    found = capsys.readouterr()
    assert found.out == plain(model, "one") + "\n"
    assert "has no chat template" in found.err
    assert main(["generate", str(bare), "one", "--system", "s"]) == 2
