"""What boundaries know in summary, report and figures, from a summary alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_summary
from summaries import read

from cache_store.errors import CorruptRecord
from cache_store.records.nodes import Commit
from orchestrator.reports.figures import information_plane
from orchestrator.reports.page import render
from orchestrator.reports.records import Summary
from orchestrator.reports.sections import SECTIONS, boundaries_of, known_after
from orchestrator.reports.tables.boundary_table import boundary_table
from orchestrator.units import DASH

NAMES = {"e2e": "End-to-end", "lw": "Layer-wise", "segprop": "SegProp"}
BLOCKS = ("seg1", "seg2", "seg3", "seg4")


def section(values: dict[str, float], *, cka: bool = True, read: int = 0) -> dict[str, Any]:
    """Block -> a value that all of its figures follow from."""
    return {
        "samples": 10_000,
        "held_out": 5_000,
        "block": 500,
        "classes": 10,
        "boundaries": {
            block: {
                "width": 512,
                "measures": {
                    "nhsic_inputs": {"value": 20 * value, "error": 0.25},
                    "nhsic_targets": {"value": 9 * value, "error": 0.05},
                    **({"cka": {"value": value, "error": 0.01}} if cka else {}),
                    "probe": {"value": value, "error": 0.004},
                    "effective_rank": {"value": 100 * value, "error": 0.5},
                },
            }
            for block, value in values.items()
        },
        "read": read,
        "ran": 15_000 - read,
        "forward_seconds": 3.0,
        "seconds": 5.0,
    }


def summary(folder: Path) -> Summary:
    values = json.loads(json.dumps(make_summary(folder)))
    stages = {name: [stage["name"] for stage in regime["stages"]] for name, regime in values["regimes"].items()}
    found: dict[str, dict[str, Any]] = {
        "e2e": {stages["e2e"][0]: section(dict(zip(BLOCKS, (0.4, 0.6, 0.8, 0.9), strict=True)), cka=False)},
        "segprop": {
            stages["segprop"][0]: section(dict(zip(BLOCKS, (0.5, 0.3, 0.2, 0.1), strict=True))),
            stages["segprop"][1]: section({"seg2": 0.6, "seg3": 0.25, "seg4": 0.2}, read=15_000),
        },
    }
    for name, sections in found.items():
        values["regimes"][name]["diagnoses"] = {"boundaries": sections}
    return read(values)


def test_what_a_stage_leaves_as_it_was_is_known_after_it_too(tmp_path: Path) -> None:
    sections = boundaries_of(summary(tmp_path).regimes["segprop"])
    first, second = known_after(sections).values()
    assert [(name, item.measures["probe"].value) for name, item in first.items()] == list(
        zip(BLOCKS, (0.5, 0.3, 0.2, 0.1), strict=True)
    )
    assert [item.measures["probe"].value for item in second.values()] == [0.5, 0.6, 0.25, 0.2]
    assert boundaries_of(summary(tmp_path).regimes["lw"]) == {}


def test_a_commit_is_read_into_its_section_whatever_else_it_says() -> None:
    result = {**section({"seg1": 0.5}), "snapshot": {}, "where": {}, "later": 1}
    where = {"host": "a", "pid": 1, "device": "cpu", "threads": 1, "started": 0.0, "finished": 1.0}
    found = SECTIONS["boundaries"](Commit("n", "a", {}, {**result, "where": where}))
    assert found == section({"seg1": 0.5})
    with pytest.raises(CorruptRecord, match="held_out"):
        SECTIONS["boundaries"](Commit("n", "a", {}, {"samples": 3, "where": where}))


def test_the_table_has_a_row_for_each_boundary_that_was_measured(tmp_path: Path) -> None:
    table = boundary_table(summary(tmp_path))
    assert table is not None
    assert [(row.regime, row.first, row.boundary) for row in table.rows] == [
        *(("e2e", block == "seg1", block) for block in BLOCKS),
        *(("segprop", block == "seg1", block) for block in BLOCKS),
        *(("segprop", False, block) for block in BLOCKS[1:]),
    ]
    assert table.rows[0].cells == ("8.00 ± 0.25", "3.600 ± 0.050", DASH, "40.00 ± 0.40", "40.0 ± 0.5")
    assert table.rows[-1].cells[2] == "0.200 ± 0.010"
    assert "10,000 training samples in blocks of 500" in table.notes[0]
    assert "is at most 9" in table.notes[0]
    assert table.notes[1].startswith("15,000 samples were read from snapshots, 30,000 went through")
    # 15 s of the three stages that were measured.
    seconds = [stage.seconds or 0 for name in ("e2e", "segprop") for stage in summary(tmp_path).regimes[name].stages]
    assert f"{1500 / sum(seconds[:3]):.1f} %" in table.notes[2]


def test_the_report_draws_measures_and_the_information_plane_side_by_side(tmp_path: Path) -> None:
    found, plain = summary(tmp_path), read(make_summary(tmp_path))
    page, without = render(found), render(plain)
    for words in ("What boundaries know", "linear probe, %", "3.600 ± 0.050", "Every boundary after every stage (11)"):
        assert words in page, words
        assert words not in without, words
    # What is drawn without it stays as it is.
    assert all(figure in page for figure in re.findall(r"<svg.*?</svg>", without, flags=re.DOTALL))
    plane = information_plane.plane(found.regimes, NAMES)
    measures = information_plane.measures(found.regimes, NAMES)
    assert plane is not None
    assert measures is not None
    stages = [stage.name for stage in found.regimes["segprop"].stages[:2]]
    for figure, drawn in ((plane, "plane"), (measures, "cka")):
        assert all(f"segprop-{stage}-{drawn}" in figure for stage in stages)
    # A panel a regime that was measured; only the last network's points are named.
    assert ("End-to-end" in plane, "SegProp" in plane, "Layer-wise" in plane) == (True, True, False)
    assert [plane.count(f">{block}<") for block in BLOCKS] == [2, 2, 2, 2]
    assert measures.count(">CKA with end-to-end<") == 1
    assert "e2e-e2e-cka" not in measures


def test_nothing_is_shown_where_nothing_was_measured(tmp_path: Path) -> None:
    plain = read(make_summary(tmp_path))
    assert boundary_table(plain) is None
    assert information_plane.plane(plain.regimes, NAMES) is information_plane.measures(plain.regimes, NAMES) is None


def test_the_page_knows_the_value_of_every_point_of_the_figure(tmp_path: Path) -> None:
    page = render(summary(tmp_path))
    [text] = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    figure = json.loads(text)["knowledge"]
    assert len({line["id"] for line in figure["lines"]}) == len(figure["lines"]) > 4
    for line in figure["lines"]:
        path = re.search(rf'<g id="{line["id"]}">\s*<path d="([^"]*)"', page)
        assert path is not None, line["id"]
        assert len(re.findall(r"[ML] ", path.group(1))) == len(line["points"])
    probes = [line["points"] for line in figure["lines"] if line["key"][::2] == ["End-to-end", "linear probe, %"]]
    assert probes == [[["seg1", 40.0], ["seg2", 60.0], ["seg3", 80.0], ["seg4", 90.0]]]
