"""The chain against transformers' own models: forward, gradients, padding, packing, windows; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_makers import (
    ARCHITECTURES,
    VOCABULARY,
    WINDOW,
    build_chain,
    lm_spec,
    logits,
    make_model,
    reference,
    run_chain,
    saved_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cache_store.errors import ConfigError
from workers.models.causal_lm.family import CAUSAL_LM
from workers.models.causal_lm.network.context import Context, Frame
from workers.models.causal_lm.network.parts import build_part, part_names, part_state_names
from workers.models.causal_lm.network.readout import loss
from workers.models.causal_lm.network.structure import structure
from workers.models.causal_lm.trials import isolation
from workers.models.causal_lm.trials.isolation import keeps_documents_apart
from workers.models.causal_lm.trials.shrunk import shrunk
from workers.models.causal_lm.trials.verify import verify_chain
from workers.specs.language import CausalLMSpec, TextSpec

LENGTH = 3 * WINDOW + 1


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(batch: int = 3, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def counted(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.arange(length).expand(batch, length)


def own(model: nn.Module, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    given_mask = None if mask is None else mask.long()
    with torch.no_grad():
        # Without a cache, as in training: with one, transformers does not look for packed documents.
        out: Tensor = model(input_ids=ids, position_ids=positions, attention_mask=given_mask, use_cache=False).logits
    return out


def chained(spec: CausalLMSpec, model: nn.Module, ids: Tensor, *frame: Any) -> Tensor:
    with torch.no_grad():
        return logits(spec, build_chain(spec, model.state_dict()), ids, *frame)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_batches_longer_than_the_window_are_bit_identical(name: str) -> None:
    spec, model = reference(name)
    ids = tokens()
    assert torch.equal(chained(spec, model, ids, counted()), own(model, ids, counted()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_right_padding_changes_nothing_at_tokens(name: str) -> None:
    spec, model = reference(name)
    ids = tokens()
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [WINDOW + 2], [1]])
    # The padding's positions are what a data loader writes there: anything.
    got = chained(spec, model, ids, counted() * mask, mask)
    want = own(model, ids, counted(), mask)
    # Not bit by bit: the chain drops the mask, and attention without one is another kernel.
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-4, atol=2e-5)


def test_right_padding_makes_no_mask_whatever_its_positions() -> None:
    """So sdpa may take its causal kernels; a restart in the padding would look like a packed document."""
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [1]])
    for positions in (counted(3, 9) * mask, counted(3, 9)):
        context = Frame(reference("llama")[0])(tokens(3, 9), positions, mask)
        assert all(layer.kwargs["attention_mask"] is None for layer in context.layers)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt2", "qwen2"])
def test_left_padding_goes_to_the_models_own_masks(name: str) -> None:
    spec, model = reference(name)
    ids = tokens()
    mask = torch.arange(LENGTH)[None] >= torch.tensor([[0], [WINDOW + 2], [LENGTH - 1]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    got, want = chained(spec, model, ids, positions, mask), own(model, ids, positions, mask)
    assert torch.equal(got[mask], want[mask])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_documents_are_as_in_the_model_and_as_alone(name: str) -> None:
    spec, model = reference(name)
    ids = tokens(2)
    positions = counted(2).clone()
    positions[0] = torch.cat([torch.arange(4), torch.arange(7), torch.arange(LENGTH - 11)])
    got = chained(spec, model, ids, positions)
    assert torch.equal(got, own(model, ids, positions))
    if keeps_documents_apart(spec):
        alone = chained(spec, model, ids[:1, 4:11], torch.arange(7)[None])
        torch.testing.assert_close(got[:1, 4:11], alone, rtol=1e-4, atol=2e-5)


def test_isolation_is_known_of_a_model_whose_masks_do_not_isolate() -> None:
    assert keeps_documents_apart(lm_spec("llama"))
    assert not keeps_documents_apart(lm_spec("opt", ffn_dim=48, word_embed_proj_dim=32))


def test_isolation_is_tried_once_a_process_and_only_where_packed_documents_are_kept_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What cannot be made narrow takes seconds, and a sweep plans many runs of one model."""
    tried = []

    def trial(spec: CausalLMSpec, narrow: bool) -> CausalLMSpec:
        tried.append(spec)
        return shrunk(spec, narrow)

    monkeypatch.setattr(isolation, "shrunk", trial)
    model = lm_spec("opt", ffn_dim=56, word_embed_proj_dim=32, tokenizer="bytes", vocab_size=260)
    found = CAUSAL_LM.inspect(model)
    data = TextSpec(name="stdlib", sequence_length=32)

    def problems(data: TextSpec) -> list[str]:
        return [message for _, message in CAUSAL_LM.data_problems(model, found, data)]

    assert problems(replace(data, isolate=False)) == problems(replace(data, pack=False)) == []
    assert tried == []
    assert len(problems(data)) == 1
    assert "does not keep packed documents apart" in problems(data)[0]
    assert len(tried) == 1
    assert problems(data) == problems(replace(data, sequence_length=16))
    assert len(tried) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_isolation_is_known_of_a_model_whose_state_leaks_past_its_masks(attention: Any) -> None:
    """Its attention masks hide the first document; its recurrence carries it on."""
    spec = lm_spec("recurrent_gemma", num_hidden_layers=3, lru_width=32, attention=attention)
    assert not keeps_documents_apart(spec)
    ids, positions = tokens(1, 12), counted(1, 6).repeat(1, 2)
    other = torch.cat([ids[:, :6].flip(1), ids[:, 6:]], dim=1)
    model = make_model(spec)
    one, two = (chained(spec, model, given, positions)[:, 6:] for given in (ids, other))
    assert not torch.allclose(one, two, rtol=1e-2, atol=1e-2)


def test_packed_rows_stay_apart_beside_a_padded_row() -> None:
    """transformers itself looks for packed documents only where no mask is given."""
    spec, model = reference("llama")
    ids = tokens(2)
    positions = counted(2).clone()
    positions[0] = torch.cat([torch.arange(6), torch.arange(LENGTH - 6)])
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    got = chained(spec, model, ids, positions, mask)
    alone = chained(spec, model, ids[:1, 6:], torch.arange(LENGTH - 6)[None])
    torch.testing.assert_close(got[:1, 6:], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_an_end_to_end_step_are_the_models(name: str) -> None:
    spec, model = reference(name)
    ids = tokens(2, 9)
    positions = counted(2, 9)
    model.zero_grad()
    out = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.autograd.backward(nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    parts = build_chain(spec, model.state_dict())
    where = torch.arange(18).view(2, 9)[:, :-1].flatten()
    readout = run_chain(parts, ids, Frame(spec)(ids, positions, None, where))
    torch.autograd.backward(loss(readout, ids[:, 1:].flatten()))
    wanted = dict(model.named_parameters())
    for part in parts.values():
        for key, parameter in part.named_parameters():
            want = wanted[key].grad
            if want is None:  # an expert that no token chose
                assert parameter.grad is None
                continue
            assert parameter.grad is not None, key
            # The loss sums in another order than transformers' own.
            scale = float(want.abs().max())
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=key)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kernels_of_attention_are_the_models(attention: Any) -> None:
    spec = lm_spec("qwen2", attention=attention)
    model = make_model(spec)
    assert structure(spec).count == 3
    assert torch.equal(chained(spec, model, tokens(), counted()), own(model, tokens(), counted()))


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_bfloat16_parts_compute_as_a_bfloat16_model(name: str, tmp_path: Path) -> None:
    """Mamba keeps its residual stream in float32, up to the LM head."""
    _, saved = saved_model(tmp_path, name)
    spec = lm_spec(name, master="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    got = chained(spec, model, tokens(), counted())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.float(), own(model, tokens(), counted()).float())
    assert not torch.equal(got.float(), own(saved, tokens(), counted()))


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, LENGTH), seed=st.integers(0, 99), data=st.data())
def test_any_shape_of_right_padding_is_right(batch: int, length: int, seed: int, data: st.DataObject) -> None:
    spec, model = reference("mistral")
    lengths = data.draw(st.lists(st.integers(1, length), min_size=batch, max_size=batch))
    ids = tokens(batch, length, seed)
    mask = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    got = chained(spec, model, ids, counted(batch, length) * mask, mask if not mask.all() else None)
    for row, count in enumerate(lengths):
        alone = own(model, ids[row : row + 1, :count], counted(1, count))
        torch.testing.assert_close(got[row : row + 1, :count], alone, rtol=1e-4, atol=2e-5)


def test_the_head_reads_where_targets_are_and_nowhere_else() -> None:
    spec, model = reference("llama")
    parts = build_chain(spec, model.state_dict())
    ids, where = tokens(), torch.tensor([2, LENGTH + 1])
    context = Frame(spec)(ids, counted(), None, where)
    got = run_chain(parts, ids, context).logits()
    # Close, not equal: the product has another shape.
    torch.testing.assert_close(got, own(model, ids, counted()).flatten(0, 1)[where], rtol=1e-5, atol=1e-5)


def test_a_context_holds_no_parameters_and_wants_no_gradients() -> None:
    for name in ("gemma3_text", "gpt2", "granite"):
        spec, _ = reference(name)
        frame = Frame(spec)
        context = frame(torch.randn(2, 7, 32, requires_grad=True), counted(2, 7))
        held = [value for one in context.layers for value in (*one.args, *one.kwargs.values())]
        flat = [t for v in held for t in (v if isinstance(v, tuple) else [v]) if isinstance(t, Tensor)]
        assert flat
        assert not any(isinstance(t, nn.Parameter) or t.requires_grad for t in flat)


def test_a_part_is_allocated_alone() -> None:
    spec = lm_spec("llama")
    part = build_part(spec, "layer1")
    assert sum(p.numel() for p in part.parameters()) == 32 * (32 + 32) + 32 * (16 + 16) + 3 * 32 * 48 + 64
    assert all(p.device.type == "cpu" for p in part.parameters())
    assert set(part_state_names(spec, "layer1")) == {n for n in make_model(spec).state_dict() if "layers.1." in n}


def test_a_layers_own_name_is_not_the_start_of_anothers() -> None:
    spec = lm_spec("llama", num_hidden_layers=12)
    assert all(".layers.1." in name for name in part_state_names(spec, "layer1"))
    assert part_names(spec)[-2:] == ["layer11", "head"]


def test_gradient_checkpointing_of_a_layer_changes_nothing() -> None:
    from torch.utils.checkpoint import checkpoint

    spec, model = reference("gemma3_text")
    layer = build_chain(spec, model.state_dict())["layer1"]
    context: Context = Frame(spec)(tokens(), counted())
    hidden = torch.randn(3, LENGTH, 32)
    grads = []
    for run in (lambda: layer((hidden,), context), lambda: checkpoint(layer, (hidden,), context, use_reentrant=False)):
        layer.zero_grad()
        torch.autograd.backward(run()[0].square().sum())
        grads.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, "no causal LM"),
        ({"model_type": "gemma3"}, "multimodal"),
        ({"model_type": "rwkv", "num_hidden_layers": 2}, "cannot be followed"),
        ({"model_type": "zamba2", "num_hidden_layers": 2}, "zamba2"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"hidden_size": 32}, "model_type is needed"),
        (None, "model_type is needed"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_not_found(config: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        part_names(CausalLMSpec(family="causal_lm", config=config))


def test_a_wrong_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="model"):
        part_names(lm_spec("llama", num_attention_heads=5))


@pytest.mark.parametrize("name", ["layer3", "layer", "layerx", "heads", ""])
def test_unknown_parts_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="layer"):
        build_part(lm_spec("llama"), name)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_the_self_check_passes_on_what_fits(name: str) -> None:
    verify_chain(lm_spec(name, num_hidden_layers=3))


def test_the_self_check_fails_on_a_broken_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: a chain that loses its sliding windows must be caught."""
    spec = lm_spec("mistral")
    verify_chain(spec)
    call = Frame.__call__

    def blind(self: Frame, ids: Tensor, positions: Tensor, *rest: Any) -> Context:
        return replace(call(self, ids, positions * 0 + torch.arange(ids.shape[1]), *rest))

    monkeypatch.setattr(Frame, "__call__", blind)
    with pytest.raises(ConfigError, match="other logits"):
        verify_chain(spec)


def test_the_self_check_is_cheap_for_a_large_model() -> None:
    spec = lm_spec(
        "llama",
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    verify_chain(spec)


def test_rotary_embeddings_that_switch_by_length_are_the_same_for_every_batch_of_a_data_set() -> None:
    """Phi-3's longrope: a sample's results must not depend on which samples come together with it."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 8,
    }
    spec = lm_spec("phi3", rope_parameters=rope, original_max_position_embeddings=8, max_position_embeddings=32)
    model = make_model(spec)
    parts = build_chain(spec, model.state_dict())
    ids = tokens(1, LENGTH)

    def run(frame: Frame, length: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = run_chain(parts, ids[:, :length], frame(ids[:, :length], counted(1, length))).logits()
        return out[:6]

    for longest, own_length in ((32, LENGTH), (8, 6)):
        short, whole = (run(Frame(spec, longest=longest), length) for length in (6, 8))
        torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
        want = own(model, ids[:, :own_length], counted(1, own_length))[0, :6]
        torch.testing.assert_close(short, want, rtol=1e-5, atol=1e-5)
    # The model itself takes one or the other by the batch.
    assert not torch.allclose(run(Frame(spec), 6), run(Frame(spec), LENGTH), rtol=1e-3, atol=1e-3)


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="looks ahead"):
        verify_chain(lm_spec("gemma3_text", use_bidirectional_attention=True))
