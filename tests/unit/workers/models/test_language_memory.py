"""Memory of language-model stages: sizes that can be counted by hand, and activations that autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.models.causal_lm.inspect import inspect
from workers.models.causal_lm.kept import Types, _kept
from workers.models.causal_lm.memory import _part, frozen_bytes, stage_memory
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.parts import build_part
from workers.models.causal_lm.network.pieces import PIECE_BYTES, chunk_rows, loss_rows
from workers.models.causal_lm.outline import LMPartOutline, lm_chain
from workers.specs.experiment import OptimizerSpec, Precision, TrainSpec
from workers.specs.language import CausalLMSpec, LoraSpec
from workers.specs.memory import ON_DEVICE
from workers.specs.tier_bytes import optimizer_bytes
from workers.update_slices import FOUR_BIT_WORKING

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 8}
NEOX = {**LLAMA, "model_type": "gpt_neox", "num_key_value_heads": 8}
TOKENS = 32
MATRIX = 512 * 64
LAYER = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 160 + 2 * 64


def parts_of(config: dict[str, Any] = LLAMA) -> list[LMPartOutline]:
    chain = lm_chain(inspect(CausalLMSpec(family="causal_lm", config=config)), TOKENS)
    return [part for part in (*chain.blocks, chain.head) if isinstance(part, LMPartOutline)]


PARTS = parts_of()
SEGMENT = [PARTS[2], PARTS[-1]]
NAMES = frozenset({"layer1", "head"})


def memory(
    train: TrainSpec, path: list[LMPartOutline] = SEGMENT, trained: frozenset[str] = NAMES, **options: Any
) -> Any:
    return stage_memory(path, trained, train, **{"master": "float32", **options})


def training(**changes: Any) -> TrainSpec:
    return TrainSpec(**{"epochs": 1, "batch_size": 4, **changes})


def test_what_is_trained_and_its_states_are_counted_in_the_type_of_the_weights() -> None:
    trainable = LAYER + MATRIX + 64
    for master, size in (("float32", 4), ("bfloat16", 2)):
        found = memory(training(), master=master)
        assert found.trainable == trainable
        assert found.weights == found.gradients == size * trainable
        assert found.optimizer == 2 * size * trainable


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (OptimizerSpec(name="adamw"), 8000),
        (OptimizerSpec(name="adamw8bit"), 2031),  # 2 bytes, and 8 a block of 256
        (OptimizerSpec(name="sgd"), 4000),
        (OptimizerSpec(name="sgd", momentum=0.0), 0),
    ],
)
def test_optimizers_keep_what_they_say(spec: OptimizerSpec, expected: int) -> None:
    assert optimizer_bytes(spec, 1000, 4000) == expected


def test_a_frozen_lm_head_is_no_gradient_no_state_and_no_float32_sum() -> None:
    whole, frozen = (memory(training(lm_head=mode)) for mode in ("train", "frozen"))
    assert whole.trainable - frozen.trainable == MATRIX
    assert whole.loss - frozen.loss == 4 * MATRIX
    assert whole.peak - frozen.peak >= 12 * MATRIX


def test_adapters_are_float32_on_what_they_are_put_on() -> None:
    rank = 4
    q, v, up = (64 + 64), (64 + 16), (64 + 160)
    some = memory(training(lora=LoraSpec(rank=rank, targets=("q_proj", "v_proj"))), master="bfloat16")
    assert some.trainable == rank * (q + v)
    every = memory(training(lora=LoraSpec(rank=rank)), master="bfloat16")
    assert every.trainable == rank * (2 * q + 2 * v + 3 * up)
    head = memory(training(lora=LoraSpec(rank=rank), lm_head="lora"), master="bfloat16")
    assert head.trainable - every.trainable == rank * (64 + 512)
    assert every.optimizer == 8 * every.trainable


def test_frozen_parts_of_a_path_take_a_byte_or_little_more_than_half_of_one() -> None:
    path = [PARTS[2], PARTS[3], PARTS[-1]]
    full, eight, four = (memory(training(frozen_weights=mode), path).weights for mode in ("full", "int8", "nf4"))
    matrices = LAYER - 2 * 64
    assert full - eight == 3 * matrices
    assert full - four == 4 * matrices - round(matrices * (0.5 + 4 / 64))


@given(vocabulary=st.integers(300, 200_000), tokens=st.integers(1, 4096), micro=st.integers(1, 32))
@settings(max_examples=50, deadline=None)
def test_the_loss_holds_pieces_of_logits_and_never_all_of_them(vocabulary: int, tokens: int, micro: int) -> None:
    head = replace(PARTS[-1], outputs=((tokens, vocabulary),), inputs=((tokens, 64),), tokens=tokens)
    found = memory(training(batch_size=micro, lm_head="frozen"), [replace(PARTS[2], tokens=tokens), head])
    assert found.loss <= 2 * max(PIECE_BYTES, 4 * vocabulary)
    assert found.loss == 2 * 4 * vocabulary * min(tokens * micro, chunk_rows(vocabulary))


def test_pieces_of_logits_grow_with_the_gradient_of_a_large_head() -> None:
    """In bfloat16, with the head trained: a quarter of its float32 gradient, between 128 and 512 MiB."""
    for vocabulary, width, piece in (
        (49_152, 576, 128),
        (128_256, 2048, 250.5),
        (128_256, 4096, 501),
        (256_000, 8192, 512),
    ):
        gradient = 4 * vocabulary * width
        assert 2 * vocabulary * loss_rows(vocabulary, 2, gradient) == pytest.approx(piece * 2**20, rel=1e-2)
        assert loss_rows(vocabulary, 2) == 128 * 2**20 // (2 * vocabulary)
        tokens = 4096
        head = replace(PARTS[-1], outputs=((tokens, vocabulary),), inputs=((tokens, width),), tokens=tokens)
        path = [replace(PARTS[2], tokens=tokens), head]
        trained = memory(training(precision="bf16"), path, master="bfloat16").loss
        # The gradient, and either that of one piece or the two blocks of 32 MiB in which softmax is made of it.
        held = 4 * vocabulary * width + max(2 * vocabulary * width, 2 * 32 * 2**20)
        assert trained - held == pytest.approx(min(2 * vocabulary * 4 * tokens, piece * 2**20), rel=1e-2)


def test_the_loss_is_computed_in_the_type_of_the_weights_whatever_autocast_does() -> None:
    """It stands outside of autocast, so float32 weights give a float32 loss: no narrow copy of the LM head is made."""
    assert memory(training(precision="bf16")).loss == memory(training(precision="fp32")).loss


def test_updating_narrow_weights_takes_copies_of_a_slice() -> None:
    settings = {"batch_size": 1, "micro_batch": 1, "precision": "bf16"}
    stochastic = memory(training(**settings), master="bfloat16")
    nearest = memory(training(**settings, optimizer=OptimizerSpec(rounding="nearest")), master="bfloat16")
    # The random bits of a slice are gone at the worst moment.
    assert stochastic.peak == nearest.peak
    # Nine float32 copies of the largest matrix while it is updated, which is less than a slice.
    matrix = max(64 * 160, MATRIX)
    held = nearest.weights + nearest.optimizer + nearest.gradients + 2 * 8 * TOKENS
    assert nearest.peak == held + 9 * 4 * matrix
    assert memory(training(**settings)).peak < 2 * nearest.peak, "float32 weights are updated in place"


def test_a_prefix_works_before_the_step_and_not_beside_it() -> None:
    alone, beside = memory(training(batch_size=8)), memory(training(batch_size=8), prefix=PARTS[:2])
    assert beside.peak - alone.peak == 4 * sum(part.parameters for part in PARTS[:2])


def test_accumulating_keeps_gradients_beside_activations() -> None:
    # Few tokens: then the moment with most is the one in which gradients are whole anyway.
    once = memory(training(batch_size=2))
    many = memory(training(batch_size=8, micro_batch=2))
    assert once.peak < many.peak <= once.peak + many.gradients + 4 * MATRIX


def test_checkpointing_and_frozen_layers_keep_less() -> None:
    path, names = PARTS[1:], frozenset(part.name for part in PARTS[1:])
    plain = memory(training(batch_size=64), path, names)
    saving = memory(training(batch_size=64, activation_checkpointing=True), path, names)
    assert saving.activations < plain.activations / 4
    assert saving.peak < plain.peak
    first = memory(training(batch_size=64), path, frozenset({"layer0", "head"}))
    assert first.activations < plain.activations


def test_the_host_also_holds_batches_that_wait_and_the_best_epoch() -> None:
    device = memory(training(epochs=2), stored_item_bytes=4)
    host = memory(training(epochs=2), stored_item_bytes=4, on_host=True)
    assert host.peak - device.peak == host.gradients + 3 * 4 * TOKENS * 64 * 4


def test_judging_needs_no_room_for_all_logits() -> None:
    parts = parts_of({**LLAMA, "vocab_size": 100_000})
    rows = 512
    held = frozen_bytes(parts, rows, master="float32", precision="fp32")
    assert sum(held.weights) == 4 * sum(part.parameters + part.buffer_elements for part in parts)
    assert 2 * PIECE_BYTES * 0.9 < held.working < 4 * rows * TOKENS * 100_000 / 10


def kept_by_autograd(config: dict[str, Any], precision: Precision, master: str, trained: bool, rows: int) -> int:
    """Bytes of the distinct tensors autograd keeps of one layer, its weights and their copies left out."""
    spec = CausalLMSpec(family="causal_lm", config=config, master=master)  # type: ignore[arg-type]
    layer = build_part(spec, "layer1").requires_grad_(trained)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    dtype = torch.float32 if master == "float32" else torch.bfloat16
    hidden = torch.randn(rows, TOKENS, 64).to(dtype).requires_grad_(True)
    context = Frame(spec)(hidden, torch.arange(TOKENS)[None].expand(rows, -1))
    weights = {tuple(parameter.shape) for parameter in layer.parameters()}
    weights |= {tuple(reversed(shape)) for shape in weights}
    seen: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Rotary factors and masks are the batch's, not the layer's.
        if tuple(tensor.shape) not in weights and tensor.numel() >= rows * TOKENS * 16:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = layer((hidden,), context)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("precision", "master"), [("fp32", "float32"), ("bf16", "float32"), ("bf16", "bfloat16"), ("fp32", "bfloat16")]
)
@pytest.mark.parametrize("config", [LLAMA, QWEN, NEOX], ids=["llama", "qwen3", "neox"])
def test_predicted_activations_are_what_autograd_keeps(
    config: dict[str, Any], precision: Precision, master: str, trained: bool
) -> None:
    assert precision in get_args(Precision)
    rows = 4
    part = _part(parts_of(config)[2], trained, training(batch_size=rows), Types.of(master, precision), ON_DEVICE)
    predicted = _kept(part, rows * TOKENS, rows, Types.of(master, precision))
    found = kept_by_autograd(config, precision, master, trained, rows)
    assert predicted == pytest.approx(found, rel=0.15)


def test_a_tied_matrix_is_counted_once() -> None:
    chain = lm_chain(inspect(CausalLMSpec(family="causal_lm", config=LLAMA)), TOKENS)
    held = [part for part in chain.held_together([*chain.blocks, chain.head]) if isinstance(part, LMPartOutline)]
    every = frozenset(part.name for part in PARTS)
    assert sum(part.parameters for part in held) == sum(part.parameters for part in PARTS) - MATRIX
    for accumulate in (1, 2):
        train = training(accumulate=accumulate)
        apart, together = memory(train, PARTS, every), memory(train, held, every)
        assert together.trainable == apart.trainable - MATRIX
        assert together.weights == apart.weights - 4 * MATRIX
        assert together.optimizer == apart.optimizer - 2 * 4 * MATRIX
        # At the end of the backward pass two gradients are added: that of the LM head and that of the embedding.
        saved = apart.peak - together.peak
        assert 3 * 4 * MATRIX <= saved <= 4 * 4 * MATRIX
    # A frozen LM head freezes the embedding with it.
    frozen = training(lm_head="frozen")
    assert memory(frozen, held, every).trainable == memory(frozen, PARTS, every).trainable - MATRIX
    assert memory(frozen, held, every).weights == memory(frozen, PARTS, every).weights - 4 * MATRIX
    # Where the embedding trains with a local head, that one's matrix is its own.
    local = chain.held_together([*chain.blocks[:2], chain.aux(2)])
    assert [part.parameters for part in local] == [part.parameters for part in (*chain.blocks[:2], chain.aux(2))]
    # A head alone holds the matrix alone.
    assert chain.held_together([chain.head]) == [chain.head]


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
def test_on_a_cpu_an_update_of_moments_in_four_bits_takes_copies_of_the_largest_matrix(master: str) -> None:
    train = training(optimizer=OptimizerSpec(name="adamw4bit"), batch_size=1)
    held, working = memory(train, master=master, on_host=True), 4 * FOUR_BIT_WORKING["cpu"] * MATRIX
    resting = held.weights + held.optimizer + held.gradients
    assert resting + working <= held.peak < resting + working + 4 * MATRIX
    # On a GPU it is compiled into one kernel.
    assert memory(train, master=master).peak < resting + working
