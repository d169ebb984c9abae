"""`orchestrator.reports.part_names`: long lists of parts, readable."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.reports.part_names import abbreviated, in_order

NAMES = st.one_of(
    st.sampled_from(["embed", "head", "aux", "base", "seg2", "seg3", "seg4"]),
    st.integers(0, 9).map(lambda number: f"layer{number}"),
)


def written_out(names: list[str]) -> list[str]:
    out: list[str] = []
    for name in names:
        found = re.fullmatch(r"layer(\d+)–layer(\d+)", name)
        out += [name] if found is None else [f"layer{index}" for index in range(int(found[1]), int(found[2]) + 1)]
    return out


def test_a_run_of_layers_is_its_ends() -> None:
    layers = [f"layer{index}" for index in range(20)]
    assert abbreviated(["embed", *layers, "layer30", "layer31", "head"]) == [
        "embed",
        "layer0–layer19",
        "layer30",
        "layer31",
        "head",
    ]


@given(st.lists(NAMES, max_size=12))
def test_nothing_is_lost_or_reordered(names: list[str]) -> None:
    assert written_out(abbreviated(names)) == names


def test_segments_of_a_resnet_are_written_out() -> None:
    assert abbreviated(["base", "seg2", "seg3", "seg4"]) == ["base", "seg2", "seg3", "seg4"]


def test_layers_are_sorted_as_one_counts() -> None:
    assert in_order(["layer10", "layer2", "embed"]) == ["embed", "layer2", "layer10"]
