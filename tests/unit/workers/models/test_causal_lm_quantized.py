"""Frozen layers in few bits: nearly what they computed, much smaller, and gradients go through them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_makers import build_chain, lm_spec, make_model
from torch import Tensor, nn

from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.lora import add_lora, merged_state, trainable
from workers.models.causal_lm.network.quantized import quantize
from workers.models.chain import ModulePath, module_bytes
from workers.specs.language import CausalLMSpec, LoraSpec

pytest.importorskip("bitsandbytes")
Mode = Literal["int8", "nf4"]
POSITIONS = torch.arange(9).expand(2, 9)
#: Relative error of a random matrix' product: a step of 1/127 of a row's largest value; sixteen levels a block of 64.
ERRORS: dict[Mode, float] = {"int8": 0.02, "nf4": 0.13}
MODES: tuple[Mode, ...] = ("int8", "nf4")


def chain(name: str = "llama", **given: Any) -> tuple[CausalLMSpec, dict[str, nn.Module]]:
    spec = lm_spec(name, **{"hidden_size": 64, "intermediate_size": 128, "n_inner": 128, **given})
    state = make_model(spec).state_dict()
    # At this width the maker's weights saturate the softmax, which then makes leaps of small differences.
    return spec, build_chain(spec, {key: value / 3 if value.ndim > 1 else value for key, value in state.items()})


def through(spec: CausalLMSpec, part: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What layer 0 adds to the residual stream, and the gradient of its sum of squares at the input."""
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    (out,) = ModulePath({"layer0": part}, trained=())((hidden,), Frame(spec)(hidden, POSITIONS))
    added = out - hidden
    (gradient,) = torch.autograd.grad(added.float().square().mean(), hidden)
    return added.detach(), gradient


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().float().norm() / wanted.detach().float().norm())


@pytest.mark.parametrize("mode", MODES)
def test_one_product_and_its_gradient_are_off_by_the_formats_rounding_and_no_more(mode: Mode) -> None:
    _, parts = chain()
    key = "model.layers.0.mlp.up_proj"
    full = parts["layer0"].get_submodule(key)
    few = quantize(chain()[1]["layer0"], mode, torch.float32).get_submodule(key)
    one = torch.randn(64, 64, requires_grad=True)
    other = one.detach().clone().requires_grad_()
    wanted, found = full(one), few(other)
    assert 0 < error(found, wanted) < ERRORS[mode]
    pull = torch.randn_like(wanted)
    torch.autograd.backward((wanted, found), (pull, pull))
    assert one.grad is not None
    assert other.grad is not None
    assert 0 < error(other.grad, one.grad) < ERRORS[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_a_frozen_layer_computes_nearly_the_same_and_so_do_its_gradients(name: str, mode: Mode) -> None:
    spec, parts = chain(name)
    wanted, slope = through(spec, parts["layer0"])
    few = quantize(parts["layer0"], mode, torch.float32)
    found, few_slope = through(spec, few)
    # A whole layer: several roundings, and a softmax between them.
    assert 0 < error(found, wanted) < 4 * ERRORS[mode]
    assert 0 < error(few_slope, slope) < 6 * ERRORS[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_without_gradients_leaves_the_later_ones_what_they_were(mode: Mode, dtype: torch.dtype) -> None:
    """Validation comes between epochs; bitsandbytes repacks matrices then, where it is let."""
    spec, parts = chain(master=str(dtype).removeprefix("torch."))
    few = quantize(parts["layer0"], mode, dtype)
    out, gradient = through(spec, few, dtype)
    with torch.no_grad():
        hidden = torch.ones(1, 9, 64, dtype=dtype)
        ModulePath({"layer0": few}, trained=())((hidden,), Frame(spec)(hidden, POSITIONS[:1]))
    again, same = through(spec, few, dtype)
    assert out.dtype == dtype
    assert torch.equal(again, out)
    assert torch.equal(same, gradient)
    assert float(gradient.float().abs().max()) > 0


@pytest.mark.parametrize(("mode", "matrix_bytes"), [("int8", 1.0), ("nf4", 0.5 + 4 / 64)])
def test_a_layer_holds_the_bytes_that_are_predicted(mode: Mode, matrix_bytes: float) -> None:
    part = chain()[1]["layer0"]
    matrices = [module for module in part.modules() if isinstance(module, nn.Linear)]
    elements = sum(module.weight.numel() for module in matrices)
    rows = sum(module.out_features for module in matrices)
    rest = module_bytes(part) - 4 * elements
    scales = 4 * rows if mode == "int8" else 0
    assert module_bytes(quantize(part, mode, torch.float32)) == rest + matrix_bytes * elements + scales


@pytest.mark.parametrize("mode", MODES)
def test_norms_embeddings_and_the_lm_head_stay_as_they_are(mode: Mode) -> None:
    _, parts = chain()
    for name in ("embed", "head"):
        before = {key: value.clone() for key, value in parts[name].state_dict().items()}
        after = quantize(parts[name], mode, torch.float32).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    norms = {key: value.clone() for key, value in parts["layer0"].state_dict().items() if "norm" in key}
    after = quantize(parts["layer0"], mode, torch.float32).state_dict()
    assert norms
    assert all(torch.equal(after[key], value) for key, value in norms.items())
    assert not any(parameter.requires_grad for key, parameter in parts["layer0"].named_parameters() if "proj" in key)


def test_products_are_computed_in_the_stages_precision() -> None:
    spec, parts = chain()
    exact = through(spec, quantize(parts["layer0"], "nf4", torch.float32))[0]
    coarse = through(spec, quantize(chain()[1]["layer0"], "nf4", torch.bfloat16))[0]
    assert coarse.dtype == torch.float32
    assert 0 < error(coarse, exact) < 0.02


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 200), mode=st.sampled_from(MODES), seed=st.integers(0, 99))
def test_matrices_of_any_shape_are_close_or_left_alone(rows: int, columns: int, mode: Mode, seed: int) -> None:
    part = chain()[1]["layer0"]
    linear = nn.Linear(columns, rows, bias=False)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    # Neighbouring rows of very different sizes: another row's scale would not do.
    weight *= 10.0 ** (torch.arange(rows) % 3)[:, None]
    linear.weight = nn.Parameter(weight)
    part.set_submodule("model.layers.0.mlp.up_proj", linear)
    few = quantize(part, mode, torch.float32).get_submodule("model.layers.0.mlp.up_proj")
    # The identity reads the matrix out. Between the levels of nf4 lie at most 0.31 of a block's largest value.
    found = few(torch.eye(columns)).t().detach()
    block, share = (columns, 0.6 / 127) if mode == "int8" else (64, 0.16)
    padded = nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
    largest = padded.abs().amax(1, keepdim=True).expand_as(padded).flatten()[: weight.numel()].view_as(weight)
    assert bool(((found - weight).abs() <= share * largest + 1e-3).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_layer_with_adapters_over_few_bits_is_committed_as_it_computed(name: str, mode: Mode) -> None:
    """What is merged: the rounded matrices, made whole, and the adapters; in plain layers it computes the same."""
    spec, parts = chain(name)
    layer = quantize(parts["layer0"], mode, torch.float32)
    add_lora(layer, LoraSpec(rank=4), seed=0)
    trained = trainable(layer)
    assert trained
    assert all("lora_" in key for key in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    wanted, pull = through(spec, layer)
    fresh = chain(name)[1]["layer0"]
    own = fresh.state_dict()
    state = merged_state(layer)
    assert {key: (t.shape, t.dtype) for key, t in state.items()} == {key: (t.shape, t.dtype) for key, t in own.items()}
    fresh.load_state_dict(state)
    found, pulled = through(spec, fresh)
    # int8 rounds the inputs of its products too.
    assert error(found, wanted) < (0.03 if mode == "int8" else 1e-5)
    assert error(pulled, pull) < (0.03 if mode == "int8" else 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_matrices_made_whole_are_off_by_the_formats_rounding(mode: Mode) -> None:
    wanted = chain()[1]["layer0"].state_dict()
    for key, tensor in merged_state(quantize(chain()[1]["layer0"], mode, torch.float32)).items():
        assert error(tensor, wanted[key]) < ERRORS[mode]
        assert tensor.ndim < 2 or error(tensor, wanted[key]) > 0


@pytest.mark.parametrize("mode", MODES)
def test_adapters_over_few_bits_learn_and_nothing_else_moves(mode: Mode) -> None:
    spec, parts = chain()
    layer = quantize(parts["layer0"], mode, torch.float32)
    path = ModulePath({"layer0": layer}, trained={"layer0"})
    add_lora(layer, LoraSpec(rank=4), seed=0)
    before = merged_state(layer)
    optimizer = torch.optim.SGD([parameter for _, parameter in path.trained_parameters()], lr=0.1)
    hidden = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        (out,) = path((hidden,), Frame(spec)(hidden, POSITIONS))
        value = out.square().mean()
        torch.autograd.backward(value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    after = merged_state(layer)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        key for key in after if after[key].ndim > 1
    }
