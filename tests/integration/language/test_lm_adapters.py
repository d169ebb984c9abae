"""Adapters by themselves: PEFT loads them on the base, where they compute what the merged export computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from lm_running import lm_changes, write_checkpoint
from running import write_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.cli import main

peft = pytest.importorskip("peft")
IDS = torch.arange(40).view(2, 20)
LORA = {"lora": {"rank": 2, "alpha": 3.0}, "optimizer": {"lr": 0.05}}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
REGIMES: dict[str, Any] = {
    "e2e": {"training": {**LORA, "lora": {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "down_proj"]}}},
    # Its last layer and LM head are trained in every stage, the others in one.
    "segprop": {"split": {"base": 1, "intermediate": "frozen"}, "training": {**LORA, "lm_head": "lora"}},
    "rounded": {"kind": "e2e", "training": {**LORA, "frozen_weights": "nf4"}},
    "base": {"kind": "segprop", "split": {"base": 1, "head": 0, "intermediate": "frozen"}, "training": LORA},
    "twice": {"kind": "segprop", "split": {"base": 1}, "training": {**LORA, "frozen_weights": "nf4"}},
    "mixed": {"kind": "segprop", "split": {"base": 1}, "training": LORA, "stages": {"stage2-layer1": {"lora": None}}},
    "whole": {"kind": "e2e"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    path = write_checkpoint(folder / "model", **WIDE)
    model = {"family": "causal_lm", "path": str(path)}
    changes = {**lm_changes(folder), "model": model, "regimes": REGIMES}
    assert main(["run", str(write_config(folder, changes)), "--quiet"]) == 0
    return folder


def base(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model", **how)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def export(folder: Path, regime: str, *more: str) -> int:
    return main(["export", str(folder / "run"), "--regime", regime, "--adapter", *more])


@pytest.mark.parametrize("regime", ["e2e", "segprop", "base"])
def test_peft_computes_and_merges_what_the_merged_export_holds(folder: Path, regime: str) -> None:
    assert export(folder, regime) == 0
    target = folder / "run" / "adapter" / regime
    assert ModelCard.load(target / "README.md").data.library_name == "peft"
    model = peft.PeftModel.from_pretrained(base(folder), target)
    merged: Any = AutoModelForCausalLM.from_pretrained(folder / "run" / "model" / regime)
    assert not torch.allclose(logits(base(folder)), logits(merged), atol=1e-2)
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    # Weights are float32: sums of the same products in another order.
    wanted = merged.state_dict()
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


def test_adapters_over_rounded_weights_compute_the_same_on_a_base_that_is_rounded_alike(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert export(folder, "rounded") == 0
    target = folder / "run" / "adapter" / "rounded"
    says = json.loads((target / "segprop.json").read_text())["base"]
    assert says["path"] == str(folder / "model")
    assert says["quantization"]["llm_int8_skip_modules"] == ["lm_head"]
    rounded = base(folder, quantization_config=BitsAndBytesConfig(**says["quantization"]), device_map="cpu")
    for module in rounded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes computes in bfloat16 on some CPUs, whatever it is asked for.
            module.support_avx512bf16_for_cpu = False
    model = peft.PeftModel.from_pretrained(rounded, target)
    merged = AutoModelForCausalLM.from_pretrained(folder / "run" / "model" / "rounded")
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)


def test_the_adapter_of_a_stage_is_what_was_trained_up_to_it(folder: Path) -> None:
    assert main(["export", str(folder / "run"), "--regime", "segprop", "--stage", "2"]) == 0
    assert export(folder, "segprop", "--stage", "2") == 0
    (target,) = (folder / "run" / "adapter-stages" / "segprop").iterdir()
    model = peft.PeftModel.from_pretrained(base(folder), target)
    merged = AutoModelForCausalLM.from_pretrained(folder / "run" / "stages" / "segprop" / target.name)
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    config = json.loads((target / "adapter_config.json").read_text())
    # Two stages of rank 2 so far.
    assert (config["r"], config["rank_pattern"][r"lm_head"]) == (2, 4)


@pytest.mark.parametrize(
    ("regime", "words"),
    [
        ("whole", "no stage trained low-rank adapters"),
        ("mixed", "stage2-layer1 trained whole weights of layer1"),
        ("twice", "layer3 was trained in several stages and rounded (nf4) again"),
    ],
)
def test_what_no_adapter_can_say_is_refused_with_the_reason(
    folder: Path, regime: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(folder, regime) == 2
    assert words in capsys.readouterr().err
    assert not (folder / "run" / "adapter" / regime).exists()
