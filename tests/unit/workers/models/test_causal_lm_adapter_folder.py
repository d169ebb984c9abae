"""PEFT folders: what several stages added to a layer is one adapter, named as PEFT's loader looks for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_makers import lm_spec
from safetensors.torch import load_file
from torch import Tensor

from cache_store.errors import UserError
from workers.models.base import AdapterExport, AdapterPiece
from workers.models.causal_lm.pretrained.adapter_folder import write_adapter
from workers.specs.language import CausalLMSpec, LoraSpec

QUERY = "model.layers.0.self_attn.q_proj"


def piece(linear: str, inputs: int, outputs: int, seed: int, *, alpha: float = 4.0, **given: Any) -> AdapterPiece:
    generator = torch.Generator().manual_seed(seed)
    rank = given.pop("rank", 2)
    tensors = {
        f"{linear}.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        f"{linear}.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }
    return AdapterPiece(lambda: tensors, LoraSpec(rank=rank, alpha=alpha), **given)


def added(pieces: list[AdapterPiece], linear: str) -> Tensor:
    total: Any = 0
    for each in pieces:
        tensors = each.tensors()
        product = tensors[f"{linear}.lora_B.weight"] @ tensors[f"{linear}.lora_A.weight"]
        total = total + each.lora.alpha / each.lora.rank * product
    return total


def write(target: Path, pieces: dict[str, list[AdapterPiece]], model: CausalLMSpec, **base: Any) -> dict[str, Any]:
    given = replace(model, path="org/base", revision="abc", **base)
    write_adapter(
        AdapterExport(model, given, pieces, {"config.json": b"{}", "tokenizer.json": b"{}"}, {"head": ["n", "d"]}),
        target,
    )
    config: dict[str, Any] = json.loads((target / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize(("stages", "rank"), [(1, 2), (3, 6), (20, 32)])
def test_adapters_of_several_stages_add_up_in_one_of_no_more_rank_than_the_layer_has(
    tmp_path: Path, stages: int, rank: int
) -> None:
    pieces = [piece(QUERY, 32, 32, seed, alpha=2.0 + seed) for seed in range(stages)]
    config = write(tmp_path / "a", {"layer0": pieces, "head": []}, lm_spec())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{QUERY}.lora_{side}.weight"] for side in "AB")
    assert config["r"] == len(down) == rank
    torch.testing.assert_close(
        config["lora_alpha"] / config["r"] * up @ down, added(pieces, QUERY), rtol=1e-4, atol=1e-4
    )
    if stages == 1:
        assert torch.equal(down, pieces[0].tensors()[f"{QUERY}.lora_A.weight"])


def test_layers_are_named_in_full_where_others_of_that_name_have_no_adapter(tmp_path: Path) -> None:
    every = {f"layer{number}": [piece(f"model.layers.{number}.mlp.up_proj", 32, 48, number)] for number in range(3)}
    every["layer0"].append(piece(QUERY, 32, 32, 9))
    config = write(tmp_path / "a", every, lm_spec())
    assert config["target_modules"] == [QUERY, "up_proj"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "segprop.json",
        "tokenizer.json",
    ]


def test_layers_that_were_trained_more_often_have_a_rank_of_their_own(tmp_path: Path) -> None:
    up = "model.layers.{}.mlp.up_proj"
    pieces = {f"layer{number}": [piece(up.format(number), 32, 48, number)] for number in range(3)}
    pieces["layer2"].append(piece(up.format(2), 32, 48, 7))
    config = write(tmp_path / "a", pieces, lm_spec())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {r"model\.layers\.2\.mlp\.up_proj": 4}
    assert config["alpha_pattern"] == {r"model\.layers\.2\.mlp\.up_proj": 8}


def test_only_parts_that_were_trained_over_rounded_matrices_are_rounded_in_the_base(tmp_path: Path) -> None:
    spec = lm_spec()
    write(
        tmp_path / "a", {"layer1": [piece(QUERY, 32, 32, 1, frozen_weights="nf4", precision="bf16")], "head": []}, spec
    )
    found = json.loads((tmp_path / "a" / "segprop.json").read_text())["base"]["quantization"]
    skipped = found.pop("llm_int8_skip_modules")
    assert found["bnb_4bit_compute_dtype"] == "bfloat16"
    assert {name.split(".")[2] for name in skipped if name.startswith("model.layers.")} == {"0", "2"}
    assert "lm_head" in skipped


@pytest.mark.parametrize(
    ("base", "pieces", "words"),
    [
        ({"path": None}, [piece(QUERY, 32, 32, 1)], "began with random weights"),
        ({"prune": (1,)}, [piece(QUERY, 32, 32, 1)], "model.prune took layers away"),
        ({}, [], "no stage trained low-rank adapters"),
        ({}, [piece(QUERY, 32, 32, 1, frozen_weights="int8")] * 2, "rounded"),
    ],
)
def test_what_no_adapter_can_say_is_refused_and_nothing_is_written(
    tmp_path: Path, base: dict[str, Any], pieces: list[AdapterPiece], words: str
) -> None:
    spec = lm_spec()
    given = replace(spec, **{"path": "org/base", **base})
    with pytest.raises(UserError, match=words):
        write_adapter(AdapterExport(spec, given, {"layer0": pieces}, {}, {}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
