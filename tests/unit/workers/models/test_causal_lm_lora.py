"""Adapters: they change nothing at first, train alone, and merge into what they computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_makers import build_chain, lm_spec, make_model, run_chain
from torch import Tensor, nn

from cache_store.errors import ConfigError
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.lora import add_lora, merged_state, trainable
from workers.models.causal_lm.network.parts import part_state_names
from workers.models.causal_lm.network.readout import loss, token_scores
from workers.specs.language import CausalLMSpec, LoraSpec

pytest.importorskip("peft")
IDS = torch.arange(3, 21).view(2, 9)
POSITIONS = torch.arange(9).expand(2, 9)
LORA = LoraSpec(rank=4, alpha=8.0)


def chain(name: str = "llama", **given: Any) -> tuple[CausalLMSpec, dict[str, nn.Module]]:
    spec = lm_spec(name, **given)
    return spec, build_chain(spec, make_model(spec).state_dict())


def stir(part: nn.Module) -> None:
    """Give adapters values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(part).values():
            parameter.normal_(generator=generator, std=0.2)


def through(spec: CausalLMSpec, parts: dict[str, nn.Module]) -> Tensor:
    with torch.no_grad():
        out: Tensor = run_chain(parts, IDS, Frame(spec)(IDS, POSITIONS)).logits()
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_merged_weights_compute_what_adapters_did(name: str) -> None:
    spec, parts = chain(name)
    before = through(spec, parts)
    for part in parts.values():
        add_lora(part, LORA, seed=1, lm_head=True)
    assert torch.equal(through(spec, parts), before)
    for part in parts.values():
        stir(part)
    adapted = through(spec, parts)
    assert not torch.allclose(adapted, before, atol=0.1)
    state = {}
    for key, part in parts.items():
        merged = merged_state(part)
        assert set(merged) == set(part_state_names(spec, key))
        state |= merged
    torch.testing.assert_close(through(spec, build_chain(spec, state)), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(through(spec, parts), adapted)


def test_only_adapters_train_and_the_embedding_and_norms_do_not() -> None:
    spec, parts = chain()
    for part in parts.values():
        add_lora(part, LORA, seed=1)
    assert trainable(parts["embed"]) == {}
    assert trainable(parts["head"]) == {}
    names = trainable(parts["layer1"])
    assert len(names) == 2 * 7
    assert all("lora_" in name for name in names)
    head = add_lora(chain()[1]["head"], LORA, seed=1, lm_head=True)
    assert {name.split(".")[0] for name in trainable(head)} == {"lm_head"}
    value = loss(run_chain({**parts, "head": head}, IDS, Frame(spec)(IDS, POSITIONS)), IDS.flatten())
    torch.autograd.backward(value)
    grads = [p.grad for part in (parts["layer0"], parts["layer2"], head) for p in trainable(part).values()]
    assert all(grad is not None for grad in grads)
    assert all(p.grad is None for p in parts["layer0"].parameters() if not p.requires_grad)


def test_targets_are_chosen_by_name() -> None:
    part = add_lora(chain()[1]["layer0"], LoraSpec(rank=2, targets=("q_proj", "mlp.up_proj")), seed=0)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(part)} == {"q_proj", "up_proj"}


def test_unknown_targets_are_named_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="gate_proj") as caught:
        add_lora(chain()[1]["layer0"], LoraSpec(targets=("query",)), seed=0)
    assert "query" in caught.value.message


def test_adapters_depend_on_seed_and_name_alone() -> None:
    def weights(layer: str, seed: int) -> dict[str, Tensor]:
        return {k: p.detach().clone() for k, p in trainable(add_lora(chain()[1][layer], LORA, seed)).items()}

    first = weights("layer0", 1)
    torch.manual_seed(99)
    second = weights("layer0", 1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], value) for key, value in weights("layer0", 2).items())
    assert any(not torch.equal(first[k.replace(".1.", ".0.", 1)], v) for k, v in weights("layer1", 1).items())


def test_bfloat16_weights_get_float32_adapters_and_merge_with_one_rounding() -> None:
    part = chain(master="bfloat16")[1]["layer0"]
    add_lora(part, LORA, seed=1)
    assert {p.dtype for p in trainable(part).values()} == {torch.float32}
    stir(part)
    key = "model.layers.0.mlp.up_proj"
    a, b = (dict(part.named_parameters())[f"{key}.lora_{which}.default.weight"] for which in "AB")
    base = dict(part.named_parameters())[f"{key}.base_layer.weight"]
    merged = merged_state(part)[f"{key}.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (base.float() + 2.0 * (b @ a)).to(torch.bfloat16))


def test_the_loss_through_an_adapted_lm_head_is_chunked_and_right() -> None:
    spec, parts = chain()
    add_lora(parts["head"], LORA, seed=1, lm_head=True)
    stir(parts["head"])
    readout = run_chain(parts, IDS, Frame(spec)(IDS, POSITIONS))
    targets = IDS.flatten()
    want = nn.functional.cross_entropy(readout.logits(), targets)
    torch.testing.assert_close(loss(readout, targets), want)
    torch.testing.assert_close(token_scores(readout, targets)[0].mean(), want.detach())
