"""Weights from files, GGUF, hub cache and seeds; what is refused before anything is written; export and back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_makers import ARCHITECTURES, VOCABULARY, build_chain, lm_spec, logits, make_model, saved_model
from real_model import gguf_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache_store.errors import ConfigError
from workers.models.causal_lm.inspect import inspect
from workers.models.causal_lm.network.parts import part_names, part_state_names
from workers.models.causal_lm.network.skeleton import build_skeleton
from workers.models.causal_lm.pretrained.export import write_folder
from workers.models.causal_lm.pretrained.import_parts import companions, import_parts
from workers.models.causal_lm.pretrained.numbering import pruned
from workers.models.causal_lm.trials.shrunk import shrunk
from workers.models.causal_lm.trials.verify import verify_chain
from workers.specs.language import CausalLMSpec

ROOT = Path(__file__).resolve().parents[4]
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def task_of(spec: CausalLMSpec) -> CausalLMSpec:
    """The spec as tasks carry it."""
    return replace(spec, config=inspect(spec).config)


def states(spec: CausalLMSpec, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    return dict(import_parts(task_of(spec), seed))


def union(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for state in parts.values() for name, tensor in state.items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def own(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


IDS = torch.arange(24).view(2, 12) * 5 % VOCABULARY


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_save_import_export_load_gives_equal_logits(name: str, tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path / "there", name)
    task = task_of(spec)
    parts = dict(import_parts(task, 0))
    assert equal(union(parts), dict(model.state_dict()))
    write_folder(task, parts.items(), companions(task), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(own(loaded, IDS), own(model, IDS))
    got = logits(task, build_chain(task, union(parts)), IDS, torch.arange(12).expand(2, 12))
    assert torch.equal(got, own(model, IDS))


def test_shards_are_read_as_one_file_is(tmp_path: Path) -> None:
    single, model = saved_model(tmp_path / "single")
    sharded, _ = saved_model(tmp_path / "sharded", shard="20KB")
    assert (tmp_path / "sharded" / INDEX).is_file()
    assert equal(union(states(single)), union(states(sharded)))
    assert equal(union(states(single)), dict(model.state_dict()))


def test_an_export_is_tied_as_long_as_the_matrices_are_the_same(tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path / "there", tie_word_embeddings=True)
    task = task_of(spec)
    write_folder(task, import_parts(task, 0), companions(task), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(own(loaded, IDS), own(model, IDS))


def test_of_a_model_that_says_it_is_tied_two_stored_matrices_decide(tmp_path: Path) -> None:
    """As transformers does: the same values are one matrix, others are two."""
    spec, _ = saved_model(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, lambda state: {**state, _HEAD: state[_EMBEDDING].clone()})
    assert inspect(spec).tied
    change_weights(tmp_path, lambda state: {**state, _HEAD: state[_HEAD] * 2})
    assert not inspect(spec).tied
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.lm_head.weight is not theirs.model.embed_tokens.weight
    found = union(states(spec))
    assert torch.equal(found[_HEAD], 2 * found[_EMBEDDING])


def test_the_configuration_may_untie_a_tied_model_but_not_tie_an_untied_one(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path / "tied", tie_word_embeddings=True)
    assert inspect(spec).tied
    assert not inspect(replace(spec, config={"tie_word_embeddings": False})).tied
    spec, _ = saved_model(tmp_path / "untied")
    message = refused(replace(spec, config={"tie_word_embeddings": True}))
    assert "has an LM head of its own" in message


def test_random_weights_of_a_tied_model_are_tied() -> None:
    task = task_of(lm_spec("llama", tie_word_embeddings=True))
    found = union(dict(import_parts(task, 0)))
    assert torch.equal(found[_HEAD], found[_EMBEDDING])
    untied = union(dict(import_parts(task_of(lm_spec("llama")), 0)))
    assert torch.equal(untied[_EMBEDDING], found[_EMBEDDING])
    assert not torch.equal(untied[_HEAD], untied[_EMBEDDING])


def test_tied_matrices_that_parted_are_exported_as_two(tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path / "there", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "there" / "model.safetensors")
    task = task_of(spec)
    parts = dict(import_parts(task, 0))
    head, embedding = parts["head"]["lm_head.weight"], parts["embed"]["model.embed_tokens.weight"]
    assert torch.equal(head, embedding)
    assert head.data_ptr() != embedding.data_ptr()
    head.mul_(2.0)
    write_folder(task, parts.items(), companions(task), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(own(loaded, IDS), 2 * own(model, IDS))


def test_an_untied_checkpoint_without_lm_head_is_refused(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    change_weights(tmp_path, lambda state: {k: v for k, v in state.items() if k != "lm_head.weight"})
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        inspect(spec)


@pytest.mark.parametrize(("master", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_master_type_is_that_of_the_weights(tmp_path: Path, master: Any, dtype: torch.dtype) -> None:
    spec, model = saved_model(tmp_path)
    found = union(states(replace(spec, master=master)))
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert equal(found, {name: tensor.to(dtype) for name, tensor in model.state_dict().items()})


def test_what_transformers_keeps_in_float32_is_not_rounded(tmp_path: Path) -> None:
    """A router's correction bias: rounded to bfloat16 it chooses other experts."""
    spec, saved = saved_model(tmp_path / "there", "glm4_moe", **_CORRECTED)
    kept = [name for name in saved.state_dict() if "e_score_correction_bias" in name]
    with torch.no_grad():
        for name in kept:
            saved.get_buffer(name).copy_(1 + torch.arange(4) * 1e-3)  # all alike in bfloat16
    saved.save_pretrained(tmp_path / "there")  # type: ignore[operator]
    task = task_of(replace(spec, master="bfloat16"))
    found = union(dict(import_parts(task, 0)))
    assert kept
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float32} == set(kept)
    assert all(torch.equal(found[name], saved.state_dict()[name]) for name in kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "there", dtype=torch.bfloat16).eval()
    assert equal(found, dict(loaded.state_dict()))
    got = logits(task, build_chain(task, found), IDS, torch.arange(12).expand(2, 12))
    assert torch.equal(got, own(loaded, IDS))
    write_folder(task, import_parts(task, 0), companions(task), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert equal(dict(exported.state_dict()), dict(loaded.state_dict()))


_CORRECTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
}


def test_random_starts_keep_the_same_weights_in_float32() -> None:
    found = union(states(lm_spec("glm4_moe", master="bfloat16", **_CORRECTED)))
    assert {"e_score_correction_bias" in name for name, t in found.items() if t.dtype == torch.float32} == {True}
    assert {t.dtype for t in found.values()} == {torch.float32, torch.bfloat16}


def test_a_single_file_counts_before_an_index_that_is_left_beside_it(tmp_path: Path) -> None:
    """As in transformers; the index is of an older, sharded save."""
    spec, _ = saved_model(tmp_path, shard="20KB")
    digest = inspect(spec).weights_digest
    newer = make_model(lm_spec("llama"), seed=1)
    single = {name: tensor.clone() for name, tensor in newer.state_dict().items()}
    save_file(single, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (tmp_path / INDEX).is_file()
    assert equal(union(states(spec)), dict(newer.state_dict()))
    assert equal(dict(AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()), single)
    changed = inspect(spec).weights_digest
    assert changed != digest
    (tmp_path / INDEX).unlink()
    assert inspect(spec).weights_digest == changed


def test_of_tied_weights_the_head_alone_is_enough(tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, lambda state: {_HEAD if k == _EMBEDDING else k: v for k, v in state.items()})
    found = union(states(spec))
    assert torch.equal(found[_EMBEDDING], model.state_dict()[_EMBEDDING])
    assert torch.equal(found[_HEAD], model.state_dict()[_EMBEDDING])
    assert found[_HEAD].data_ptr() != found[_EMBEDDING].data_ptr()


def test_an_untied_checkpoint_without_embedding_is_refused(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    change_weights(tmp_path, lambda state: {k: v for k, v in state.items() if k != _EMBEDDING})
    assert _EMBEDDING in refused(spec)


_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_infinite_numbers_of_a_configuration_pass(tmp_path: Path) -> None:
    """Mamba-2's time_step_limit ends at infinity, which JSON has no number for."""
    given = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "pad_token_id": 0}
    spec, model = saved_model(tmp_path, "mamba2", **given)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    task = task_of(spec)
    json.dumps(task.config, allow_nan=False)
    assert build_skeleton(task).config.time_step_limit[1] == float("inf")
    assert equal(union(dict(import_parts(task, 0))), dict(model.state_dict()))


def test_special_tokens_outside_a_smaller_vocabulary_are_named() -> None:
    message = refused(lm_spec("phi3", vocab_size=50, pad_token_id=32000))
    assert "pad_token_id 32000" in message
    assert "vocabulary of 50" in message


def test_the_self_check_shrinks_the_vocabulary_and_keeps_special_tokens_inside() -> None:
    verify_chain(lm_spec("phi3", pad_token_id=VOCABULARY - 1, eos_token_id=VOCABULARY - 2))
    verify_chain(lm_spec("cwm", bos_token_id=VOCABULARY - 1))  # which takes no null


def test_heads_of_each_layer_are_counted_by_layer() -> None:
    wider = {"1": {"head_dim": 16}}
    spec = lm_spec("gemma4_text", layer_types=["full_attention", "sliding_attention", "full_attention"], **_PLAIN_GEMMA)
    lm = inspect(replace(spec, config={**(spec.config or {}), "per_layer_config": wider}))
    widths = [lm.parts[f"layer{index}"].attention_width for index in range(3)]
    assert widths == [4 * 8, 4 * 16, 4 * 8]


_PLAIN_GEMMA = {"hidden_size_per_layer_input": 0, "head_dim": 8, "num_kv_shared_layers": 0, "sliding_window": 4}


def test_auto_keeps_the_checkpoints_type(tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path / "a")
    model.bfloat16().save_pretrained(tmp_path / "b")  # type: ignore[operator]
    auto = replace(spec, master="auto")
    assert {t.dtype for t in union(states(auto)).values()} == {torch.float32}
    assert {t.dtype for t in union(states(replace(auto, path=str(tmp_path / "b")))).values()} == {torch.bfloat16}
    assert inspect(replace(auto, path=str(tmp_path / "b"))).config["dtype"] == "bfloat16"


def test_states_share_no_memory_with_the_files(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for tensor in union(states(spec)).values():
        tensor.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "smollm3"])
def test_pruned_layers_are_gone_for_good(name: str, tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path / "there", name)
    cut = replace(spec, prune=(1,))
    lm = inspect(cut)
    assert lm.layers == 2
    task = replace(cut, config=lm.config)
    parts = dict(import_parts(task, 0))
    whole = model.state_dict()
    for key in part_state_names(task, "layer1"):
        assert torch.equal(parts["layer1"][key], whole[key.replace(".1.", ".2.", 1)])
    write_folder(task, parts.items(), companions(task), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    got = logits(task, build_chain(task, union(parts)), IDS, torch.arange(12).expand(2, 12))
    assert torch.equal(got, own(loaded, IDS))
    for kinds in ("layer_types", "no_rope_layers"):
        if model.config.to_dict().get(kinds):  # type: ignore[union-attr, operator]
            assert loaded.config.to_dict()[kinds] == [model.config.to_dict()[kinds][i] for i in (0, 2)]  # type: ignore[union-attr, operator]


def test_pruning_moves_the_numbers_of_layers_along(tmp_path: Path) -> None:
    """Qwen2-MoE names its dense layers by number: without layer 0, number 1 is number 0."""
    spec, model = saved_model(tmp_path / "there", "qwen2_moe", mlp_only_layers=[1], num_experts=4, **_NARROW_EXPERTS)
    cut = replace(spec, prune=(0,))
    task = task_of(cut)
    assert (task.config or {})["mlp_only_layers"] == [0]
    parts = dict(import_parts(task, 0))
    whole = model.state_dict()
    assert equal(
        union(parts),
        {name: whole[_layer_later(name)] for name in union(parts)},
    )
    write_folder(task, parts.items(), companions(task), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    got = logits(task, build_chain(task, union(parts)), IDS, torch.arange(12).expand(2, 12))
    assert torch.equal(got, own(loaded, IDS))


_NARROW_EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}


def _layer_later(name: str) -> str:
    return re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + 1}.", name)


@pytest.mark.parametrize(
    ("config", "prune", "want"),
    [
        ({"model_type": "gpt2", "n_layer": 4}, [1], {"n_layer": 3}),
        ({"model_type": "xglm", "num_layers": 4}, [1], {"num_layers": 3}),
        ({"num_hidden_layers": 6, "first_k_dense_replace": 2}, [0], {"first_k_dense_replace": 1}),
        ({"num_hidden_layers": 6, "first_k_dense_replace": 2}, [4, 5], {"first_k_dense_replace": 2}),
        ({"num_hidden_layers": 6, "num_kv_shared_layers": 2}, [0, 5], {"num_kv_shared_layers": 1}),
        ({"num_hidden_layers": 6, "full_attn_idxs": [0, 3, 5]}, [1, 3], {"full_attn_idxs": [0, 3]}),
        ({"num_hidden_layers": 4, "moe_layers": [1, 3]}, [0, 1], {"moe_layers": [1]}),
        ({"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}, [1], {"no_rope_layers": [1, 1, 0]}),
        ({"num_hidden_layers": 4, "intermediate_size": [1, 2, 3, 4]}, [1], {"intermediate_size": [1, 3, 4]}),
        (
            {"num_hidden_layers": 3, "per_layer_config": {"00": {"a": 1}, "02": {"a": 2}}},
            [0],
            {"per_layer_config": {"1": {"a": 2}}},
        ),
        (
            {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
            [0],
            {"decoder_sparse_step": 1, "mlp_only_layers": [1, 2]},
        ),
        ({"num_hidden_layers": 5, "block_types": ["r", "r", "a"]}, [0], {"block_types": ["r", "a", "r", "r"]}),
        (
            {"model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["global", "local"], 2]]},
            [0],
            {"num_layers": 3, "attention_types": [[["local"], 1], [["global"], 1], [["local"], 1]]},
        ),
        ({"layers_block_type": ["moe", "mlp", "moe"]}, [1], {"layers_block_type": ["moe", "moe"]}),
        (
            {"num_hidden_layers": 3, "eos_token_id": [1, 2, 0], "mlp_multipliers": [1.0, 2.0, 3.0]},
            [1],
            {"eos_token_id": [1, 2, 0]},
        ),
    ],
)
def test_every_way_of_numbering_layers_moves_along(config: Any, prune: list[int], want: dict[str, Any]) -> None:
    left = pruned(config, prune)
    assert {key: left[key] for key in want} == want


def test_numbers_that_cannot_move_are_refused() -> None:
    """Every second layer of Jamba has attention, from the first on: without layer 0 the others would change places."""
    period = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    spec = lm_spec("jamba", num_hidden_layers=4, num_experts=2, mamba_dt_rank=4, **period)
    assert inspect(spec).layers == 4
    assert "by its number" in refused(replace(spec, prune=(0,)))
    assert inspect(replace(spec, prune=(2, 3))).layers == 2


@pytest.mark.parametrize("name", ["gpt_neo", "longcat_flash"])
def test_the_self_check_takes_one_layer_of_a_kind(name: str) -> None:
    """Whatever word layers have for their own number: else each would be of another kind, and the small model large."""
    small = shrunk(CausalLMSpec(family="causal_lm", config={"model_type": name}), narrow=True)
    assert len(part_names(small)) - 2 == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(-2, 14), max_size=6))
def test_pruning_keeps_the_lists_in_step_or_refuses(count: int, prune: list[int]) -> None:
    config = {"num_hidden_layers": count, "layer_types": [str(i) for i in range(count)], "eos_token_id": [1] * count}
    if any(not 0 <= index < count for index in prune) or len(set(prune)) >= count:
        with pytest.raises(ConfigError, match="allowed"):
            pruned(config, tuple(prune) or (count,))
        return
    left = pruned(config, tuple(prune))
    assert left["layer_types"] == [str(i) for i in range(count) if i not in prune]
    assert left["num_hidden_layers"] == len(left["layer_types"])
    assert left["eos_token_id"] == config["eos_token_id"]


def test_random_parts_depend_on_seed_and_part_alone() -> None:
    spec = lm_spec("llama")
    torch.manual_seed(1)
    first = states(spec, 7)
    position = torch.random.get_rng_state()
    second = states(spec, 7)
    assert torch.equal(torch.random.get_rng_state(), position)
    assert all(equal(first[name], second[name]) for name in first)
    other = states(spec, 8)
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first["layer0"][key], other["layer0"][key])
    assert not torch.equal(first["layer0"][key], first["layer1"][key.replace(".0.", ".1.")])
    assert float(first["layer0"][key].std()) == pytest.approx(0.02, rel=0.2)
    assert torch.equal(first["layer0"]["model.layers.0.input_layernorm.weight"], torch.ones(32))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_starts_set_everything(name: str) -> None:
    found = union(states(lm_spec(name)))
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_a_checkpoint_without_the_base_models_prefix_is_read(tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path, "gpt2")
    change_weights(tmp_path, lambda state: {k.removeprefix("transformer."): v for k, v in state.items()})
    assert equal(union(states(spec)), dict(model.state_dict()))


def test_inspecting_counts_exactly(tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path, "mixtral")
    lm = inspect(spec)
    assert sum(lm.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert list(lm.parameters) == ["embed", "layer0", "layer1", "layer2", "head"]
    assert (lm.layers, lm.hidden, lm.vocabulary, lm.positions, lm.has_weights) == (3, 32, VOCABULARY, 64, True)


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path / "a")
    saved_model(tmp_path / "b")
    digest = inspect(spec).weights_digest
    assert digest is not None
    assert inspect(replace(spec, path=str(tmp_path / "b"))).weights_digest == digest
    change_weights(tmp_path / "b", lambda state: {**state, "model.norm.weight": state["model.norm.weight"] + 1})
    assert inspect(replace(spec, path=str(tmp_path / "b"))).weights_digest != digest
    assert inspect(lm_spec("llama")).weights_digest is None


def test_a_config_alone_can_be_inspected_and_not_imported(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    lm = inspect(spec)
    assert not lm.has_weights
    assert lm.weights_digest is None
    with pytest.raises(ConfigError, match=r"neither model\.safetensors"):
        next(import_parts(replace(spec, config=lm.config), 0))


def test_settings_are_laid_over_the_checkpoints_config(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    lm = inspect(replace(spec, config={"rms_norm_eps": 0.125}))
    assert lm.config["rms_norm_eps"] == 0.125
    assert lm.config["hidden_size"] == 32


# ---- what is refused, before a single part comes


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change({k: v.clone() for k, v in load_file(path).items()}), path, metadata={"format": "pt"})


def refused(spec: CausalLMSpec) -> str:
    """What `inspect` says, before anything runs."""
    with pytest.raises(ConfigError) as caught:
        inspect(spec)
    return caught.value.message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path, shard="20KB")
    task = task_of(spec)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refused(spec)
    with pytest.raises(ConfigError, match=gone.name):
        next(import_parts(task, 0))


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path, shard="20KB")
    task = task_of(spec)
    cut = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    cut.write_bytes(cut.read_bytes()[:-10])
    assert cut.name in refused(spec)
    with pytest.raises(ConfigError, match=cut.name):
        next(import_parts(task, 0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2000), st.binary(max_size=40))
def test_damaged_headers_are_refused_and_never_crash(tmp_path_factory: Any, at: int, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    spec, _ = saved_model(folder, num_hidden_layers=1)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at : at + len(junk)] = junk
    path.write_bytes(bytes(data))
    with contextlib.suppress(ConfigError):  # junk may also hit padding or values, and then there is nothing to see
        states(spec)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    spec, _ = saved_model(tmp_path)
    change_weights(tmp_path, lambda state: {k: v for k, v in state.items() if k != name})
    assert name in refused(spec)
    assert str(tmp_path) in refused(spec)


def test_another_vocabulary_is_named_with_its_file(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    message = refused(replace(spec, config={"vocab_size": 50}))
    assert "vocabulary" in message
    assert "model.safetensors" in message
    assert "97" in message
    assert "50" in message


def test_an_index_that_promises_what_a_shard_lacks_is_refused(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path, shard="20KB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "model.extra" in refused(spec)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    spec, _ = saved_model(tmp_path, shard="20KB")
    (tmp_path / INDEX).write_text(content)
    assert "index" in refused(spec)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickle" in refused(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"path": "/no/such/folder"}, "neither a folder nor a hub id"),
        ({"path": "./nowhere"}, "neither a folder nor a hub id"),
        ({"path": None}, "model_type"),
    ],
)
def test_missing_models_are_named(spec: Any, words: str) -> None:
    assert words in refused(CausalLMSpec(family="causal_lm", **spec))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_descriptions_that_are_no_files_or_absurd_are_refused_and_nothing_waits(tmp_path: Path, name: str) -> None:
    spec, _ = saved_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    path = tmp_path / name
    for content in (b"[" * 100_000, b'{"a":' * 50_000, b"9" * 6000, b"\xff\xfe", b"null"):
        path.write_bytes(content)
        assert name in refused(spec)
    if name == "config.json":  # what is no file is no index
        path.unlink()
        os.mkfifo(path)
        assert "config.json cannot be read" in refused(spec)
        path.unlink()
        path.symlink_to("/dev/zero")
        assert "not a regular file" in refused(spec)


def test_a_folder_without_config_and_broken_configs_are_refused(tmp_path: Path) -> None:
    spec = CausalLMSpec(family="causal_lm", path=str(tmp_path))
    assert "no config.json" in refused(spec)
    for content in ("{", "[]", "{}", '{"model_type": 3}'):
        (tmp_path / "config.json").write_text(content)
        assert "config.json" in refused(spec)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").unlink()
    assert "model.gguf" in refused(spec)
    assert "a.gguf" in refused(replace(spec, gguf="b.gguf"))
    assert "GGUF" in refused(replace(spec, gguf="a.gguf"))


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "gptq" in refused(spec)


# ---- the hub, without one


def hub_cache(cache: Path, commit: str) -> None:
    """A model in the hub's cache, as a download leaves it."""
    repository = cache / "models--somebody--tiny"
    saved_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def ask_hub(cache: Path, *asked: dict[str, Any]) -> list[str]:
    """What comes of inspect + import, in a process of its own: the hub's settings are read once."""
    code = (
        "import sys, json, dataclasses\n"
        "from workers.specs.language import CausalLMSpec\n"
        "from cache_store.errors import ConfigError\n"
        "from workers.models.causal_lm.inspect import inspect\n"
        "from workers.models.causal_lm.pretrained.import_parts import import_parts\n"
        "for given in json.loads(sys.argv[1]):\n"
        "    spec = CausalLMSpec(family='causal_lm', **given)\n"
        "    try:\n"
        "        lm = inspect(spec)\n"
        "        parts = dict(import_parts(dataclasses.replace(spec, config=lm.config), 0))\n"
        "        print('fine', len(parts), lm.weights_digest)\n"
        "    except ConfigError as e:\n"
        "        print('refused', e.message)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    return done.stdout.strip().splitlines()


def test_hub_ids_come_from_the_cache_when_offline_and_are_named_when_not_there(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub_cache(tmp_path, commit)
    tiny = {"path": "somebody/tiny"}
    latest, pinned, wrong, other = ask_hub(
        tmp_path, tiny, {**tiny, "revision": commit}, {**tiny, "revision": "v9"}, {"path": "somebody/other"}
    )
    assert latest.startswith("fine 5")
    assert pinned == latest
    assert wrong.startswith("refused")
    assert "v9" in wrong
    assert other.startswith("refused")
    assert "somebody/other" in other


# ---- memory


def test_importing_holds_one_part_and_one_tensor(tmp_path: Path) -> None:
    code = (
        "import sys, json, dataclasses, torch\n"
        "sys.path.insert(0, 'tests/support')\n"
        "torch.set_num_threads(1)\n"
        "from lm_makers import lm_spec\n"
        "from workers.models.causal_lm.inspect import inspect\n"
        "from workers.models.causal_lm.pretrained.import_parts import import_parts\n"
        "from workers.models.causal_lm.pretrained.export import write_folder\n"
        "from workers.models.causal_lm.network.parts import part_names\n"
        "from workers.training.memory import PeakMeter, settled_private_bytes\n"
        "from pathlib import Path\n"
        "spec = lm_spec('llama', num_hidden_layers=12, hidden_size=512, intermediate_size=2048, vocab_size=8000,"
        " master='bfloat16')\n"
        "lm = inspect(spec)\n"
        "task = dataclasses.replace(spec, config=lm.config)\n"
        "target = Path(sys.argv[1])\n"
        "write_folder(task, import_parts(task, 0), {}, target, shard_bytes=20_000_000)\n"
        "task = dataclasses.replace(task, path=str(target), master='float32')\n"
        "next(import_parts(task, 0))\n"  # whatever libraries allocate once
        "before = settled_private_bytes()\n"
        "meter = PeakMeter(torch.device('cpu'))\n"
        "total = 0\n"
        "for name, state in import_parts(task, 0):\n"
        "    total += sum(t.numel() * 4 for t in state.values())\n"
        "print(total, meter.stop().host - before, max(lm.parameters.values()) * 4)\n"
    )
    # Freed tensors go back to the system at once: else what the allocator keeps of them is 0 to 40 MB of the peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    total, peak, largest = map(int, done.stdout.split()[-3:])
    assert total > 200e6
    # The part in hand, the next one being made of it, and one tensor of the largest part.
    assert peak < 3 * largest < total / 2


# ---- export


def test_exports_are_sharded_with_an_index(tmp_path: Path) -> None:
    spec, model = saved_model(tmp_path / "there")
    task = task_of(spec)
    target = write_folder(task, import_parts(task, 0), companions(task), tmp_path / "out", shard_bytes=20_000)
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert torch.equal(own(AutoModelForCausalLM.from_pretrained(target).eval(), IDS), own(model, IDS))
    assert equal(union(states(replace(spec, path=str(target)))), dict(model.state_dict()))


def test_experts_are_stored_one_by_one_as_others_expect_them(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path / "there", "mixtral")
    task = task_of(spec)
    write_folder(task, import_parts(task, 0), companions(task), tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names == set(load_file(tmp_path / "there" / "model.safetensors"))
    assert any("experts.3." in name for name in names)


def test_an_incomplete_export_leaves_no_folder(tmp_path: Path) -> None:
    spec = lm_spec("llama")
    task = task_of(spec)
    parts = dict(import_parts(task, 0))
    some = [(name, state) for name, state in parts.items() if name != "layer1"]
    with pytest.raises(ConfigError, match="layer1"):
        write_folder(task, some, {}, tmp_path / "out")
    with pytest.raises(ConfigError, match="twice"):
        write_folder(task, [*parts.items(), ("head", parts["head"])], {}, tmp_path / "out")
    with pytest.raises(ValueError, match="layer0"):
        write_folder(task, [("layer0", parts["layer1"])], {}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        write_folder(task, parts.items(), {}, tmp_path / "full")


def test_companions_travel_and_a_tokenizers_folder_goes_before_the_models(tmp_path: Path) -> None:
    spec, _ = saved_model(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("own")
    (tmp_path / "model" / "chat_template.jinja").write_text("own")
    (tmp_path / "other" / "tokenizer.json").write_text("other")
    task = task_of(spec)
    assert companions(task)["chat_template.jinja"] == b"own"
    other = companions(replace(task, tokenizer=str(tmp_path / "other")))
    assert other["tokenizer.json"] == b"other"
    assert "chat_template.jinja" not in other
    assert set(companions(replace(task, tokenizer="bytes"))) == {"config.json", "generation_config.json"}
    assert set(companions(task_of(lm_spec("llama")))) == {"config.json"}
    config = json.loads(companions(task)["config.json"])
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"


# ---- the real one


@pytest.fixture(scope="module")
def smollm() -> CausalLMSpec:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = gguf_file()
    return CausalLMSpec(family="causal_lm", path=str(file.parent), gguf=file.name)


def test_smollm2_from_gguf_speaks_after_import_and_export(smollm: CausalLMSpec, tmp_path: Path) -> None:
    task = task_of(smollm)
    target = write_folder(task, import_parts(task, 0), companions(task), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.chat_template
    assert len(part_names(task)) == 32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(loaded.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in said
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr(), "tied, as in the file"
    assert (target / "model.safetensors").stat().st_size == pytest.approx(4 * 134_515_008, rel=0.001)
