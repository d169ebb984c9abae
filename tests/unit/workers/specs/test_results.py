"""Results of nodes, as commits have them: read, written again, and read from what other versions wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cache_store.errors import CorruptRecord
from cache_store.records.nodes import Commit
from workers.specs import data_results, results
from workers.specs.results import (
    EpochFigures,
    HeldParts,
    LeftSets,
    MaterializeResult,
    NodeFigures,
    PartialSet,
    PartRecord,
    SnapshotCounters,
    StageResult,
)

#: One result of every kind, as runs had committed them before results had types.
COMMITTED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[3] / "data" / "results.json").read_text())
KINDS = {
    "data images": data_results.ImageDataResult,
    "data text": data_results.TextDataResult,
    "model": results.ModelResult,
    "materialize": results.MaterializeResult,
    "measure": results.MeasureResult,
    "average": results.AverageResult,
    "evaluate": results.EvaluateResult,
    "questions": results.QuestionsResult,
    "judge": results.JudgeResult,
    "train": results.StageResult,
}


def commit_of(name: str, **changes: Any) -> Commit:
    return Commit("node", "attempt", {}, {**COMMITTED[name], **changes})


def paths(value: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where every key of nested JSON objects is, in order."""
    for key, item in value.items() if isinstance(value, Mapping) else ():
        yield (*at, key)
        yield from paths(item, (*at, key))


@pytest.mark.parametrize("name", list(COMMITTED))
def test_a_result_that_is_read_is_written_again_key_for_key(name: str) -> None:
    found = commit_of(name).read(KINDS[name] if name in KINDS else KINDS[name.split()[0]])
    again = found.to_json()
    assert json.loads(json.dumps(again)) == COMMITTED[name]
    assert list(paths(again)) == list(paths(COMMITTED[name]))


def test_the_two_kinds_of_data_say_where_their_splits_are() -> None:
    images = commit_of("data images").read(data_results.ImageDataResult)
    assert (images.train, images.rows["test"]) == (COMMITTED["data images"]["train"], 360)
    text = commit_of("data text").read(data_results.TextDataResult)
    assert text.split("validation").tokens == COMMITTED["data text"]["validation"]["tokens"]
    assert (text.pad, text.restarts) == (256, True)
    assert text.origin == COMMITTED["data text"]["origin"]


def test_a_stage_is_read_down_to_its_parts_epochs_and_sets() -> None:
    stage = commit_of("train along").read(StageResult)
    assert all(isinstance(part, PartRecord) for part in stage.parts.values())
    assert isinstance(stage.epochs[0], EpochFigures)
    assert (stage.epochs[0].unit, stage.epochs[0].rate) == (
        "images",
        COMMITTED["train images"]["epochs"][0]["images_per_s"],
    )
    assert stage.partial == {"snapshot/train/0": PartialSet(set="s", rows=96)}
    assert stage.where.ranks is not None
    assert [rank.pid for rank in stage.where.ranks] == [1, 2]
    assert stage.memory is not None
    assert commit_of("train text").read(StageResult).epochs[0].unit == "samples"
    assert commit_of("train left out").read(StageResult).memory is None


def test_keys_of_a_later_version_are_passed_over_and_those_an_earlier_one_lacks_have_defaults() -> None:
    later = commit_of("train images", invented={"later": 1})
    assert later.read(StageResult) == commit_of("train images").read(StageResult)
    young = ("input_seconds", "train_spec", "host_baseline_bytes", "peak_host_bytes", "resumed")
    old = {key: value for key, value in COMMITTED["train images"].items() if key not in young}
    old["epochs"] = [
        {k: v for k, v in epoch.items() if k not in ("validation", "peak_host_bytes")} for epoch in old["epochs"]
    ]
    stage = Commit("node", "attempt", {}, old).read(StageResult)
    assert (stage.input_seconds, stage.train_spec, stage.resumed, stage.epochs[0].validation) == (None, None, 0, {})


@pytest.mark.parametrize(
    ("name", "kind", "key"),
    [
        ("materialize images", MaterializeResult, "set"),
        ("train images", StageResult, "parts"),
        ("train images", StageResult, "where"),
        ("evaluate text", results.EvaluateResult, "metrics"),
    ],
)
def test_what_every_version_writes_must_be_there_and_the_error_says_where(name: str, kind: Any, key: str) -> None:
    less = {other: value for other, value in COMMITTED[name].items() if other != key}
    with pytest.raises(CorruptRecord, match=rf"nodes/node/commit\.json: .*{key}.*run the node again"):
        Commit("node", "attempt", {}, less).read(kind)


def test_a_part_of_a_result_is_read_without_the_rest() -> None:
    assert commit_of("average").read(HeldParts).parts["head"].file == "head.safetensors"
    assert commit_of("model images").read(HeldParts).parts == {}
    assert commit_of("train images").read(LeftSets).partial == {}
    assert commit_of("train along").read(LeftSets).partial["snapshot/train/0"].set == "s"
    figures = commit_of("materialize text").read(NodeFigures)
    assert (figures.bytes, figures.resumed) == (COMMITTED["materialize text"]["bytes"], None)
    assert figures.where is not None
    assert figures.where.host == "machine"


def test_counters_add_up() -> None:
    one = SnapshotCounters(hits=1, misses=2, bytes_read=3, bytes_written=4)
    assert sum([one, one], SnapshotCounters()) == SnapshotCounters(hits=2, misses=4, bytes_read=6, bytes_written=8)


def test_a_node_is_scored_by_the_epoch_it_committed() -> None:
    trained = COMMITTED["train images"]
    figures = commit_of("train images").read(NodeFigures)
    committed = trained["epochs"][trained["committed_epoch"]]
    assert figures.score()["accuracy"] == committed["validation_accuracy"]
    assert commit_of("evaluate images").read(NodeFigures).score() == COMMITTED["evaluate images"]["metrics"]
    assert commit_of("materialize images").read(NodeFigures).score() == {}
