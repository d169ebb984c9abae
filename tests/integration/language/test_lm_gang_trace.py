"""The plan's memory of one rank against torch's tracker in the real step, among ranks that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_store.errors import UserError
from orchestrator.runs.prepare import prepare
from orchestrator.runs.trace import StageTrace, trace_node

ROOT = Path(__file__).parents[3]
SMALL = [
    "model.config.hidden_size=512",
    "model.config.intermediate_size=1792",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=2",
    "model.config.vocab_size=16000",
    "model.config.num_hidden_layers=7",
    "model.master=bfloat16",
    "data.sequence_length=128",
    "split.intermediate=frozen",
    "snapshots.mode=always",
    "training.micro_batch=2",
    "training.optimizer.rounding=nearest",
    "regimes=[segprop]",
    "resources.device=cuda",
]


def small(index: int, strategy: str, ranks: int, *overrides: str) -> StageTrace:
    gang = [f"resources.gang.strategy={strategy}", f"resources.gang.size={ranks}"]
    prepared = prepare(ROOT / "configs" / "lm_quickstart.yaml", [*SMALL, *gang, *overrides])
    regime = next(iter(prepared.plan.regimes.values()))
    return trace_node(prepared, regime.name, regime.stages[index])


@pytest.mark.parametrize(
    ("strategy", "ranks", "index", "overrides"),
    [
        ("fsdp2", 4, 0, ""),
        ("fsdp2", 4, 0, "model.config.tie_word_embeddings=true"),
        ("fsdp2", 2, 1, "snapshots.mode=never"),
        ("fsdp2", 4, 1, "training.activation_checkpointing=true training.batch_size=8"),
        ("fsdp2", 4, 0, "model.master=float32 training.precision=fp32"),
        ("fsdp2", 4, 1, "training.lora.rank=8 training.lm_head=lora"),
        ("ddp", 4, 1, ""),
        ("ddp", 4, 0, "model.master=float32 training.precision=fp32"),
    ],
)
def test_the_plan_says_what_the_tracker_finds_on_a_rank(strategy: str, ranks: int, index: int, overrides: str) -> None:
    found = small(index, strategy, ranks, *overrides.split())
    assert found.ranks == ranks
    assert abs(found.deviation) < 0.05, found


def test_a_rank_holds_its_part_of_weights_gradients_and_states() -> None:
    """Shapes of whole tensors, by which torch tells how a sharded result is shaped, are nobody's memory."""
    layer, rest = 2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1792 + 2 * 512, 2 * 16_000 * 512
    found = small(0, "fsdp2", 4).found
    # Two layers trained, one in the head, four frozen between; embedding and LM head.
    assert found.parameters == pytest.approx(2 * (7 * layer + rest) / 4, rel=1e-3)
    assert found.gradients == pytest.approx(2 * (3 * layer + rest) / 4, rel=1e-3)
    assert found.optimizer == pytest.approx(2 * found.gradients, rel=1e-3)


def test_ranks_of_zero3_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.config.rules.gangs.has_deepspeed", lambda: True)
    with pytest.raises(UserError, match="zero3 cannot be traced"):
        small(1, "zero3", 2, "model.master=float32")
