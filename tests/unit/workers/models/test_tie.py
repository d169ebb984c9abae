"""Which stages hold a tied embedding and LM head as one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from workers.models.causal_lm.tie import ties
from workers.specs.experiment import TrainSpec
from workers.specs.language import LoraSpec

FROZEN, LORA = {"lm_head": "frozen"}, {"lora": LoraSpec()}


@dataclass(frozen=True)
class Trains:
    name: str
    trained: tuple[str, ...]
    adapter: tuple[int, int] | None = None
    aux: int | None = None


E2E = [("embed layer0 layer1 head", {})]
SEGPROP: list[tuple[str, dict[str, Any]]] = [("embed layer0 head", {}), ("layer1 head", {}), ("layer2 head", {})]
LW: list[tuple[str, dict[str, Any]]] = [("embed layer0", {}), ("layer1", {}), ("head", {})]


def decided(stages: list[tuple[str, dict[str, Any]]], *, in_turn: bool = True, **changes: Any) -> Any:
    made = [
        (Trains(f"stage{number}", tuple(trained.split())), TrainSpec(**{**own, **changes}))
        for number, (trained, own) in enumerate(stages, 1)
    ]
    return ties(made, 1000, in_turn=in_turn)


@pytest.mark.parametrize(
    ("stages", "changes", "held"),
    [
        (E2E, {}, [True]),
        (E2E, FROZEN, [True]),
        (E2E, LORA, [True]),
        (E2E, {**LORA, "lm_head": "lora"}, [False]),
        (SEGPROP, {}, [True, False, False]),
        (SEGPROP, FROZEN, [True, True, True]),
        (SEGPROP, LORA, [True, True, True]),
        (SEGPROP, {**LORA, **FROZEN}, [True, True, True]),
        ([SEGPROP[0], ("layer1 head", FROZEN), ("layer2 head", FROZEN)], {}, [True, True, True]),
        ([SEGPROP[0], ("layer1 head", FROZEN), ("layer2 head", {})], {}, [True, True, False]),
        # A base that is taken as it comes, or whose embedding stays.
        ([("layer1 head", {})], {}, [False]),
        ([("layer0 head", {})], FROZEN, [True]),
        (LW, {}, [False, False, False]),
        (LW, FROZEN, [True, True, True]),
    ],
)
def test_a_tie_holds_up_to_the_stage_that_trains_one_without_the_other(
    stages: list[tuple[str, dict[str, Any]]], changes: dict[str, Any], held: list[bool]
) -> None:
    found = decided(stages, **changes)
    assert found.start
    assert list(found.held) == held
    assert (found.note is None) is all(held)


def test_the_note_says_which_stage_parts_them_and_what_keeps_them_one() -> None:
    note = decided(SEGPROP).note
    assert "stage2 trains the LM head without the embedding" in note
    assert "1,000 parameters more" in note
    assert "training.lm_head: frozen" in note
    assert "stage1 trains the embedding without the LM head" in decided(LW).note


def test_overlapping_stages_hold_copies_of_the_head_so_any_change_parts_them_from_the_start() -> None:
    later_frozen = [SEGPROP[0], ("layer1 head", FROZEN)]
    assert decided(later_frozen).held == (True, True)
    parted = decided(later_frozen, in_turn=False)
    assert parted.held == (False, False)
    assert "stage1 trains both while other stages hold copies" in parted.note
    assert decided(SEGPROP, in_turn=False).held == (False, False, False)
    for same in (FROZEN, LORA):
        assert decided(SEGPROP, in_turn=False, **same).held == (True, True, True)
