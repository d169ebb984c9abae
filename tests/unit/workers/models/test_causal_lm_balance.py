"""The balance loss of mixture-of-experts models against transformers' own, with `output_router_logits`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_makers import VOCABULARY, build_chain, lm_spec, make_model
from torch import Tensor, nn

from workers.models.base import StageTraining
from workers.models.causal_lm.family import CAUSAL_LM
from workers.models.causal_lm.inspect import inspect
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.readout import loss, with_balance
from workers.models.causal_lm.training import CausalLMParts
from workers.models.chain import ModulePath
from workers.specs.experiment import OptimizerSpec, TrainSpec
from workers.specs.language import CausalLMSpec, LoraSpec

LENGTH = 9
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "router_aux_loss_coef": 0.5,
    },
}


def moe(name: str) -> tuple[CausalLMSpec, nn.Module]:
    spec = lm_spec(name, **MODELS[name])
    return spec, make_model(spec)


def padded_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask, and labels as transformers takes them."""
    ids = torch.randint(3, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, 5:] = mask[2, 7:] = False
    return ids, mask, ids.masked_fill(~mask, -100)


def stage(spec: CausalLMSpec, model: nn.Module, trained: set[str], train: TrainSpec) -> ModulePath:
    """A path of the whole chain that trains some of its parts, in train mode."""
    parts = build_chain(spec, model.state_dict())
    path = ModulePath(parts, trained, activations="recompute" if train.activation_checkpointing else "keep")
    for name in sorted(trained):
        CausalLMParts(spec).prepare_training(name, parts[name], train, seed=0)
    path.train(True)
    return path


def losses(spec: CausalLMSpec, path: ModulePath) -> tuple[Tensor, Tensor]:
    """The loss of the next tokens of the padded batch, and the one that is trained on."""
    ids, mask, labels = padded_batch()
    counts = labels[:, 1:] != -100
    where = torch.arange(ids.numel()).view(ids.shape)[:, :-1][counts]
    positions = torch.arange(LENGTH).expand(ids.shape)
    readout = path((ids,), Frame(spec)(ids, positions, mask, where))
    plain = loss(readout, labels[:, 1:][counts])
    return plain, with_balance(readout, plain)


def train_spec(**given: Any) -> TrainSpec:
    return TrainSpec(epochs=1, batch_size=4, **given)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_gradients_of_an_end_to_end_step_are_transformers(name: str, checkpointing: bool) -> None:
    spec, model = moe(name)
    ids, mask, labels = padded_batch()
    wanted = model.train()(
        input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False, output_router_logits=True
    )
    torch.autograd.backward(wanted.loss)
    parts = CausalLMParts(spec).names()
    path = stage(spec, model, set(parts), train_spec(activation_checkpointing=checkpointing))
    plain, trained = losses(spec, path)
    torch.testing.assert_close(trained, wanted.loss)
    torch.testing.assert_close(trained - plain, 0.5 * wanted.aux_loss)
    torch.autograd.backward(trained)
    own = dict(model.named_parameters())
    for key, parameter in path.trained_parameters():
        want = own[key.partition("/")[2]].grad
        assert parameter.grad is not None
        assert want is not None
        scale = float(want.abs().max())
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=key)


def test_a_stage_balances_the_routers_of_the_layers_that_train() -> None:
    spec, model = moe("mixtral")
    ids, mask, _ = padded_batch()
    own = model(input_ids=ids, attention_mask=mask.long(), use_cache=False, output_router_logits=True)
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    plain, trained = losses(spec, stage(spec, model, {"layer1", "layer2", "head"}, train_spec()))
    wanted = load_balancing_loss_func(own.router_logits[1:], 4, 2, mask)
    torch.testing.assert_close(trained - plain, 0.5 * wanted)


def test_frozen_routers_have_no_balance_loss() -> None:
    spec, model = moe("mixtral")
    lora = LoraSpec(rank=2, alpha=4.0, dropout=0.0, targets=["q_proj"])
    for path in (
        stage(spec, model, {"head"}, train_spec()),
        stage(spec, model, {"layer0", "layer1", "layer2"}, train_spec(lora=lora)),
    ):
        plain, trained = losses(spec, path)
        assert torch.equal(plain, trained)


def test_what_is_validated_is_the_loss_of_the_tokens_alone() -> None:
    spec, model = moe("mixtral")
    path = stage(spec, model, {"layer1"}, train_spec())
    path.train(False)
    plain, scored = losses(spec, path)
    assert torch.equal(plain, scored)


def told(spec: CausalLMSpec, *stages: StageTraining) -> list[str]:
    return list(CAUSAL_LM.notes(spec, inspect(spec), stages))


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_says_where_all_routers_are_frozen_and_none_where_one_trains(name: str) -> None:
    spec, _ = moe(name)
    (note,) = told(spec, StageTraining(("head",), TrainSpec()))
    assert note.startswith("All routers of experts are frozen")
    assert "(router_aux_loss_coef 0.5) is not counted, and none is needed." in note
    assert told(spec, StageTraining(("layer1", "head"), TrainSpec(lora=LoraSpec(rank=2)))) == [note]
    frozen, trained = StageTraining(("head",), TrainSpec()), StageTraining(("layer1", "head"), TrainSpec())
    assert told(spec, frozen, trained) == []


def test_models_without_experts_or_without_a_coefficient_have_nothing_to_say_of_routers() -> None:
    head = StageTraining(("head",), TrainSpec())
    assert told(lm_spec("llama"), head) == []
    assert told(lm_spec("mixtral", num_local_experts=4, router_aux_loss_coef=0.0), head) == []
    # A dense model may carry the coefficient of its family.
    assert told(lm_spec("llama", router_aux_loss_coef=0.1), head) == []


def test_the_plan_warns_of_the_stage_whose_rate_is_the_smallest() -> None:
    spec = replace(lm_spec("llama"), master="bfloat16")
    stages = [
        StageTraining((part,), TrainSpec(optimizer=OptimizerSpec(lr=lr, rounding="nearest")))
        for part, lr in (("layer0", 1.0), ("layer1", 1e-6))
    ]
    assert told(spec, stages[0]) == []
    (note,) = told(spec, *stages)
    assert "rounding nearest, lr 1e-06" in note
    exact = [StageTraining(stage.trained, TrainSpec(optimizer=OptimizerSpec(lr=1e-6))) for stage in stages]
    assert told(spec, *exact) == []
