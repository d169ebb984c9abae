"""The search for settings that fit, over memory that is made up: what it changes, in which order, and that it is
right."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.costs.fit import Fit, Settings, evened, largest_micro, nearest_fit

AS_IT_IS = {
    "activation_checkpointing": False,
    "optimizer.name": "adamw",
    "frozen_weights": "full",
    "lm_head": "train",
    "lora.rank": None,
}


def taken(settings: Settings) -> int:
    """States 40, frozen weights 20, a head of 10, and 8 activations a sample, a quarter of them with checkpointing."""
    if "lora.rank" in settings:
        states, head = 1, 0
    else:
        states, head = (20 if "optimizer.name" in settings else 40), (0 if "lm_head" in settings else 10)
    frozen = {"int8": 10, "nf4": 5}.get(settings.get("frozen_weights", ""), 20)
    each = 2 if settings.get("activation_checkpointing") else 8
    return states + frozen + head + each * settings.get("micro_batch", 16)


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (198, {}),
        (197, {"micro_batch": 15}),
        (102, {"micro_batch": 4}),
        # Below four samples a micro-batch recomputing costs less time.
        (101, {"micro_batch": 15, "activation_checkpointing": True}),
        (78, {"micro_batch": 4, "activation_checkpointing": True}),
        (77, {"micro_batch": 3, "activation_checkpointing": True}),
        (71, {"micro_batch": 10, "activation_checkpointing": True, "optimizer.name": "adamw8bit"}),
        # Small micro-batches change nothing, fewer bits do.
        (
            47,
            {
                "micro_batch": 3,
                "activation_checkpointing": True,
                "optimizer.name": "adamw8bit",
                "frozen_weights": "int8",
            },
        ),
        (
            41,
            {
                "micro_batch": 3,
                "activation_checkpointing": True,
                "optimizer.name": "adamw8bit",
                "frozen_weights": "nf4",
            },
        ),
        (8, {"micro_batch": 1, "activation_checkpointing": True, "frozen_weights": "nf4", "lora.rank": 16}),
    ],
)
def test_what_changes_least_of_what_is_learned_is_found_first(usable: int, expected: dict[str, Any]) -> None:
    found = nearest_fit(taken, usable, 16, AS_IT_IS)
    assert found == Fit(expected, taken(expected))
    assert taken(expected) <= usable


def test_nothing_is_found_where_nothing_fits() -> None:
    assert nearest_fit(taken, 7, 16, AS_IT_IS) is None


def test_settings_that_do_not_go_together_and_those_not_named_are_left_alone() -> None:
    def peak(settings: Settings) -> int | None:
        return None if "optimizer.name" in settings else taken(settings)

    given_ = {key: value for key, value in AS_IT_IS.items() if key != "lora.rank"}
    found = nearest_fit(peak, 60, 16, given_)
    assert found == Fit({"micro_batch": 2, "activation_checkpointing": True, "frozen_weights": "nf4"}, 59)
    assert nearest_fit(peak, 46, 16, given_) is None


#: A base of 18 blocks whose states may lie on the host, like its frozen blocks.
OFF_DEVICE = AS_IT_IS | {
    "memory.optimizer": "device",
    "memory.masters": "none",
    "memory.frozen": "device",
    "split.base_segment_size": 18,
}


def taken_off_device(settings: Settings) -> int:
    """As `taken`, with states in proportion to the pieces of the base, and a gradient of 4 where they are away."""
    piece = settings.get("split.base_segment_size", 18)
    trained = 1 if "lora.rank" in settings else 2 * piece
    states = {"host": 4}.get(settings.get("memory.optimizer", ""), 20 if "optimizer.name" in settings else 40)
    frozen = 2 if "memory.frozen" in settings else {"int8": 10, "nf4": 5}.get(settings.get("frozen_weights", ""), 20)
    each = 2 if settings.get("activation_checkpointing") else 8
    return trained + min(states, trained) + frozen + each * int(settings.get("micro_batch", 16))


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (220, {}),
        (104, {"micro_batch": 6, "activation_checkpointing": True}),
        (96, {"micro_batch": 11, "activation_checkpointing": True, "memory.frozen": "host"}),
        # Below four samples a micro-batch streaming costs less time, and updates on the host round differently.
        (80, {"micro_batch": 3, "activation_checkpointing": True, "memory.frozen": "host"}),
        (72, {"micro_batch": 6, "activation_checkpointing": True, "memory.optimizer": "host"}),
        (
            36,
            {
                "micro_batch": 6,
                "activation_checkpointing": True,
                "memory.frozen": "host",
                "memory.optimizer": "host",
                "split.base_segment_size": 9,
            },
        ),
        (
            8,
            {
                "micro_batch": 1,
                "activation_checkpointing": True,
                "memory.frozen": "host",
                "split.base_segment_size": 1,
            },
        ),
    ],
)
def test_tiers_on_the_host_come_before_anything_else_that_is_learned(usable: int, expected: dict[str, Any]) -> None:
    found = nearest_fit(taken_off_device, usable, 16, OFF_DEVICE)
    assert found is not None
    assert found.settings == expected


def test_masters_go_where_updates_are_computed_and_what_lies_elsewhere_stays() -> None:
    beside = OFF_DEVICE | {"memory.masters": "device"}
    found = nearest_fit(taken_off_device, 72, 16, beside)
    assert found is not None
    assert {"memory.optimizer": "host", "memory.masters": "host"}.items() <= found.settings.items()
    elsewhere = {key: value for key, value in OFF_DEVICE.items() if key != "memory.optimizer"}
    found = nearest_fit(taken_off_device, 72, 16, elsewhere)
    assert found is not None
    assert "memory.optimizer" not in found.settings


def test_few_settings_are_tried_where_all_that_change_no_result_do_not_suffice() -> None:
    tried: list[Settings] = []

    def peak(settings: Settings) -> int:
        tried.append(settings)
        return taken_off_device(settings)

    assert nearest_fit(peak, 24, 16, OFF_DEVICE) is not None
    assert len(tried) < 40, "of 48 ways to keep the base whole none is tried but the farthest"


@given(st.integers(1, 64), st.integers(1, 10), st.integers(0, 50), st.integers(1, 500))
def test_the_largest_micro_batch_fits_and_the_next_does_not(most: int, each: int, fixed: int, usable: int) -> None:
    found = largest_micro(lambda size: fixed + each * size, usable, 1, most)
    if found is None:
        assert fixed + each > usable
        return
    size, peak = found
    assert peak == fixed + each * size <= usable
    assert size == most or fixed + each * (size + 1) > usable


@given(st.integers(1, 500), st.integers(1, 500))
def test_an_evened_micro_batch_takes_as_many_passes_and_no_fewer_samples_fit(micro: int, batch: int) -> None:
    size = evened(micro, batch)
    assert size <= micro
    assert -(-batch // size) == -(-batch // micro)
    assert size == 1 or -(-batch // (size - 1)) > -(-batch // micro)
