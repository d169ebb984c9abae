"""`orchestrator.reports.records`: `summary.json` and its types say the same, in files of earlier versions too."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_lm_run import make_lm_summary
from fake_run import make_commits, make_plan
from summaries import read

from cache_store.errors import CorruptRecord
from orchestrator.environment import Environment
from orchestrator.reports.record_json import OPTIONAL, from_json, to_json
from orchestrator.reports.records import EpochSummary, Summary, WorkPlace
from orchestrator.reports.summary import summarize

GOLDEN = Path(__file__).parents[3] / "data" / "summaries"


@pytest.mark.parametrize("name", ["quickstart", "lm_quickstart"])
def test_a_summary_of_an_earlier_version_is_read_and_written_again_byte_for_byte(name: str) -> None:
    text = (GOLDEN / f"{name}.json").read_text()
    summary = from_json(Summary, json.loads(text))
    assert json.dumps(to_json(summary), indent=1) + "\n" == text
    assert summary.regimes["segprop"].done


def test_what_is_summed_up_is_read_back_equal(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, epochs=2)
    commits = make_commits(plan)
    for count in (0, 5, len(plan.nodes)):
        done = {node.id: commits[node.id] for node in plan.nodes[:count]}
        summary = summarize("fake", plan, done, status="stopped", environment=Environment(), failures={"x": "lost"})
        assert from_json(Summary, json.loads(json.dumps(to_json(summary)))) == summary


def test_ranks_of_a_gang_and_figures_of_newer_workers_are_kept() -> None:
    where = {"host": "a", "pid": 1, "world_size": 2, "strategy": "ddp", "ranks": [{"pid": 1}], "first_step": 2.5}
    place = from_json(WorkPlace, where)
    assert (place.world_size, place.others["strategy"]) == (2, "ddp")
    assert to_json(place) == where
    epoch = from_json(EpochSummary, {"epoch": 0, "tokens_per_s": 9.0})
    assert epoch.figure("tokens_per_s") == to_json(epoch)["tokens_per_s"] == 9.0
    assert epoch.figure("images_per_s") is None


@dataclass(frozen=True)
class Inner:
    x: int
    y: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    more: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "outer: has no inner"),
        ({"inner": {"x": 1, "z": 2}}, "outer.inner: unknown keys: z"),
        ({"inner": 3}, "outer.inner: must be an object"),
        ({"inner": {"x": 1}, "more": {}}, "outer.more: must be a list"),
        ({"inner": {"x": 1}, "more": [{"x": 1}, {}]}, r"outer.more\[1\]: has no x"),
    ],
)
def test_a_record_that_is_not_what_it_must_be_is_refused_by_its_key(data: Any, words: str) -> None:
    with pytest.raises(CorruptRecord, match=words):
        from_json(Outer, data, "outer")


def test_a_field_that_is_optional_is_left_out_where_it_is_none() -> None:
    assert to_json(Outer(Inner(1))) == {"inner": {"x": 1}, "more": []}
    assert to_json(Inner(1, 0.5)) == {"x": 1, "y": 0.5}


def test_layers_of_language_models_are_numbers_or_the_head(tmp_path: Path) -> None:
    summary = make_lm_summary(tmp_path, stages=3)
    assert [stage.layer for stage in read(summary).regimes["segprop"].stages] == [19, 20, "head"]
    assert to_json(read(summary)) == summary
