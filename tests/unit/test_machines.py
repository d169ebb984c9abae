"""What `auto` slots mean on a cluster: every slot fits into one machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.machines import Machine, Slots, room, settle

CPU_HEAD = Machine(0)
MACHINES = st.lists(
    st.builds(Machine, st.integers(0, 64).map(float), st.integers(0, 8).map(float)), min_size=1, max_size=12
)


@pytest.mark.parametrize(
    ("machines", "asked", "expected"),
    [
        # A head that takes no work, two workers of one core: the smoke test of deploy/.
        ([CPU_HEAD, Machine(1), Machine(1)], {"chains": 3}, Slots(2, 1, "cpu")),
        # One regime alone gets one slot, as wide as a machine and not as wide as two.
        ([CPU_HEAD, Machine(4), Machine(4)], {"chains": 1}, Slots(1, 4, "cpu")),
        ([CPU_HEAD, Machine(4), Machine(4)], {"chains": 3}, Slots(3, 2, "cpu")),
        ([Machine(4), Machine(2)], {"threads": 2}, Slots(3, 2, "cpu")),
        ([Machine(4), Machine(2)], {"slots": 3}, Slots(3, 2, "cpu")),
        # The driver's machine has no GPU, the workers do.
        ([CPU_HEAD, Machine(8, 4), Machine(8, 4)], {}, Slots(8, 1, "cuda")),
        ([CPU_HEAD, Machine(8, 4), Machine(8, 4)], {"device": "cpu", "chains": 2}, Slots(2, 8, "cpu")),
        ([Machine(4, 8)], {"threads": 2}, Slots(2, 2, "cuda")),
        # What is given stays as it is, fit or not.
        ([Machine(2)], {"slots": 3, "threads": 4}, Slots(3, 4, "cpu")),
    ],
)
def test_auto_is_settled_from_the_machines(
    machines: list[Machine], asked: dict[str, int | str], expected: Slots
) -> None:
    options = {"slots": "auto", "threads": "auto", "device": "auto", "chains": 3, **asked}
    assert settle(machines, **options) == expected  # type: ignore[arg-type]


@given(MACHINES, st.integers(1, 5), st.sampled_from(["auto", "cpu", "cuda"]))
def test_automatic_slots_fit_wherever_anything_fits(machines: list[Machine], chains: int, device: str) -> None:
    slots = settle(machines, slots="auto", threads="auto", device=device, chains=chains)
    assert slots.count >= 1
    assert slots.threads >= 1
    gpus = 1 if slots.device == "cuda" else 0
    if room(machines, 1, gpus):
        assert room(machines, slots.threads, gpus) >= slots.count


def test_a_slot_does_not_span_machines() -> None:
    assert room([Machine(2), Machine(2)], 3) == 0
    assert room([Machine(8, 1), Machine(2, 4)], 2, 1) == 2
