"""`segprop cache`: what it shows, what it finds damaged, and what it deletes."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from planning import small_config, small_plan

from cache_store.errors import UserError
from cache_store.formats.codec import Field
from cache_store.records.nodes import NodeStore
from cache_store.records.record_io import dump_record, parse_record
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import FileInfo, Storage
from cache_store.storage.open import open_storage
from orchestrator import cli
from orchestrator.cache.commands import age
from orchestrator.cache.contents import store_facts
from orchestrator.cache.garbage import CommitFacts, StoreFacts, collect, needed_sets
from orchestrator.cache.inventory import survey
from orchestrator.execution.plan_record import PlannedNode, PlanRecord, read_plans, write_plan
from orchestrator.units import human_age

DAY = 86400.0
NOW = 1_000 * DAY


# -- decisions ----------------------------------------------------------------------------------------------


def plan(committed_reader: bool = False, kept: bool = False) -> tuple[PlanRecord, dict[str, CommitFacts]]:
    """data -> snapshot -> stage, the first two committed."""
    nodes = {
        "d": PlannedNode("data", "data", ()),
        "m": PlannedNode("materialize", "snapshot seg1", ("d",)),
        "t": PlannedNode("train", "stage2", ("m",)),
    }
    commits = {"d": CommitFacts("a1", frozenset({"images"})), "m": CommitFacts("a1", frozenset({"snap"}))}
    if committed_reader:
        commits["t"] = CommitFacts("a1")
    return PlanRecord("run", nodes, frozenset({"t"}), frozenset({"m"} if kept else ())), commits


def facts(
    files: list[tuple[str, float]], plans: dict[str, PlanRecord] | None = None, commits: Any = None, **more: Any
) -> StoreFacts:
    """`files`: (path, age in days)."""
    return StoreFacts(
        survey=survey(FileInfo(path, 10, NOW - days * DAY) for path, days in files),
        commits=commits or {},
        plans=plans or {},
        kinds=more.pop("kinds", {"snap": "boundary", "images": "images"}),
        listed=more.pop("listed", frozenset()),
        now=NOW,
    )


SETS = [("sets/snap/set.json", 30.0), ("sets/images/set.json", 30.0)]


def deleted(found: StoreFacts, days: float = 7) -> set[str]:
    return {waste.path for waste in collect(found, days * DAY)}


@pytest.mark.parametrize(
    ("committed_reader", "kept", "plan_age", "activity", "gone"),
    [
        (False, False, 1, 30, set()),  # started yesterday, unfinished: its reader needs the set
        (False, False, 30, 1, set()),  # started long ago, but worked on yesterday
        (False, False, 30, 30, {"sets/snap", "plans/p.json"}),  # abandoned
        (True, False, 1, 1, {"sets/snap"}),  # finished: nothing reads it any more
        (True, True, 30, 30, set()),  # finished, asked to be kept
    ],
)
def test_a_set_goes_when_no_plan_under_way_reads_it(
    committed_reader: bool, kept: bool, plan_age: float, activity: float, gone: set[str]
) -> None:
    record, commits = plan(committed_reader, kept)
    files = [*SETS, ("plans/p.json", plan_age), ("nodes/m/commit.json", activity)]
    assert deleted(facts(files, {"plans/p.json": record}, commits)) == gone


def test_decoded_data_stays_while_a_commit_names_it() -> None:
    record, commits = plan(committed_reader=True)
    assert "sets/images" not in deleted(facts(SETS, {"p": record}, commits))
    assert "sets/images" in deleted(facts(SETS, {}, {}))


def test_what_is_younger_than_the_limit_stays() -> None:
    files = [("sets/snap/set.json", 6.9), ("nodes/n/attempts/a/f", 6.9), ("sets/x/quarantine/f", 6.9)]
    assert deleted(facts(files)) == set()
    assert deleted(facts(files), days=6) == {"sets/snap", "nodes/n/attempts/a", "sets/x"}


def test_attempts_and_checkpoints_go_when_nobody_comes_back_for_them() -> None:
    record, commits = plan()
    files = [
        ("plans/p.json", 1.0),
        ("nodes/d/attempts/a1/f", 30.0),  # committed
        ("nodes/d/attempts/a2/f", 30.0),  # lost
        ("nodes/d/checkpoints/a1/000001/f", 30.0),  # of a committed node
        ("nodes/t/attempts/a3/f", 30.0),  # never committed
        ("nodes/t/attempts/a4/f", 30.0),  # never committed, but checkpointed yesterday
        ("nodes/t/checkpoints/a4/000001/f", 1.0),
        ("nodes/t/checkpoints/a3/000001/f", 30.0),  # a plan under way may go on with it
        ("nodes/z/checkpoints/a1/000001/f", 30.0),  # of no plan
    ]
    assert deleted(facts(files, {"plans/p.json": record}, commits)) == {
        "nodes/d/attempts/a2",
        "nodes/d/checkpoints/a1",
        "nodes/t/attempts/a3",
        "nodes/z/checkpoints/a1",
    }


def test_a_node_with_a_damaged_commit_is_left_alone() -> None:
    assert deleted(facts([("nodes/n/attempts/a/f", 30.0)], commits={"n": CommitFacts(None)})) == set()


def test_finished_work_goes_only_where_it_is_said_what_to_keep() -> None:
    record, commits = plan(committed_reader=True)
    files = [("sets/images/set.json", 9.0), *((f"nodes/{node}/commit.json", 9.0) for node in "dmt")]
    found = facts(files, {"plans/p.json": record}, commits)
    assert collect(found, 0.0) == []
    kept = collect(found, 0.0, frozenset("dm"))
    assert [waste.path for waste in kept] == ["nodes/t"]
    gone = {waste.path for waste in collect(found, 0.0, frozenset("t"))}
    assert gone == {"nodes/d", "nodes/m", "sets/images"}
    # Younger than the limit, of a plan under way, or damaged: they stay.
    assert collect(found, 10 * DAY, frozenset()) == []
    under_way = facts(files, {"plans/p.json": record}, {"d": commits["d"], "m": commits["m"]})
    assert not {waste.path for waste in collect(under_way, 20 * DAY, frozenset())}
    damaged = facts(files, {}, {**commits, "t": CommitFacts(None)})
    assert "nodes/t" not in {waste.path for waste in collect(damaged, 0.0, frozenset())}


def test_quarantine_probes_and_unlisted_shards_go() -> None:
    record, commits = plan()
    shards = [f"sets/snap/shards/00000{i}.a.arrow" for i in range(2)]
    files = [
        *SETS,
        ("plans/p.json", 1.0),
        (".probe-1", 30.0),
        ("sets/snap/quarantine/x", 30.0),
        ("nodes/n/quarantine/x", 30.0),
        *((path, 30.0) for path in shards),
    ]
    found = facts(files, {"plans/p.json": record}, commits, listed=frozenset(shards[:1]))
    assert deleted(found) == {".probe-1", "sets/snap/quarantine", "nodes/n/quarantine", shards[1]}


@given(st.data())
def test_nothing_needed_is_ever_collected(data: st.DataObject) -> None:
    """Whatever the plans, commits and ages."""
    ids = [f"n{i}" for i in range(6)]
    sets = [f"s{i}" for i in range(4)]
    # Whole days: seconds since 1970 as floats tell no finer ages apart than they should.
    ages = st.integers(0, 30).map(float)
    records = {}
    for p in range(data.draw(st.integers(0, 3))):
        chosen = data.draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
        nodes = {
            node: PlannedNode("materialize", node, tuple(data.draw(st.lists(st.sampled_from(chosen), max_size=2))))
            for node in chosen
        }
        pick = st.lists(st.sampled_from(chosen), max_size=3).map(frozenset)
        records[f"plans/p{p}.json"] = PlanRecord("run", nodes, data.draw(pick), data.draw(pick))
    commits = {
        node: CommitFacts("a", data.draw(st.lists(st.sampled_from(sets), max_size=2).map(frozenset)))
        for node in data.draw(st.lists(st.sampled_from(ids), unique=True))
    }
    files = [(f"sets/{name}/set.json", data.draw(ages)) for name in sets]
    files += [(path, data.draw(ages)) for path in records]
    files += [(f"nodes/{node}/attempts/{a}/f", data.draw(ages)) for node in ids for a in ("a", "b")]
    kinds = {name: data.draw(st.sampled_from(["boundary", "images"])) for name in sets}
    found = facts(files, records, commits, kinds=kinds)
    limit = data.draw(ages)
    gone = deleted(found, limit)
    assert gone.isdisjoint(f"sets/{name}" for name in needed_sets(found, limit * DAY))
    assert gone.isdisjoint(f"nodes/{node}/attempts/a" for node in commits)
    for path, days in files:
        if days < limit:
            assert not any(path == each or path.startswith(f"{each}/") for each in gone)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("90m", 5400), ("1.5h", 5400), ("7d", 7 * DAY), ("2w", 14 * DAY)]
)
def test_ages_are_read_and_shown(text: str, seconds: float) -> None:
    assert age(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 days", "1e3s", "nan s"])
def test_other_ages_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--older-than"):
        age(text)


def test_ages_are_shown_in_their_largest_unit() -> None:
    assert [human_age(s) for s in (-1, 5, 119, 300, 3600 * 5, DAY * 9)] == ["0 s", "5 s", "119 s", "5 m", "5 h", "9 d"]


# -- plan records -------------------------------------------------------------------------------------------


def test_a_plan_record_says_what_the_plan_says_and_starting_again_makes_it_young(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    planned = small_plan(tmp_path)
    write_plan(storage, "small", planned)
    (path,) = read_plans(storage)
    os.utime(tmp_path / "store" / path, (1e9, 1e9))
    write_plan(storage, "small", planned)
    ((again, record),) = read_plans(storage).items()
    assert again == path
    assert time.time() - (tmp_path / "store" / path).stat().st_mtime < 60
    assert set(record.nodes) == {node.id for node in planned.nodes}
    assert record.targets == set(planned.targets)
    assert {node_id: set(node.parents) for node_id, node in record.nodes.items()} == {
        node.id: set(node.parents.values()) for node in planned.nodes
    }


def test_plan_records_of_older_programs_are_read(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    write_plan(storage, "small", small_plan(tmp_path))
    ((path, record),) = read_plans(storage).items()
    nodes = {
        node_id: {"kind": node.kind, "label": node.label, "parents": sorted(node.parents)}
        for node_id, node in record.nodes.items()
    }
    older = {"format": 1, "run": "small", "nodes": nodes, "targets": sorted(record.targets), "kept": []}
    storage.write(path, dump_record(older, "a plan"))
    found = read_plans(storage)[path].nodes
    assert {node_id: set(node.parents) for node_id, node in found.items()} == {
        node_id: set(node.parents) for node_id, node in record.nodes.items()
    }


def test_damaged_plan_records_are_passed_over(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    write_plan(storage, "small", small_plan(tmp_path))
    (path,) = read_plans(storage)
    for data in (b"{}", b"[]", b"x", storage.read(path)[:-1], b'{"format":1,"run":1,"nodes":1,"targets":1,"kept":1}'):
        storage.write(path, data)
        assert read_plans(storage) == {}


# -- the commands -------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    """Decoded data and a half-made boundary set, each named by a commit; an attempt that lost."""
    storage = open_storage(str(tmp_path / "store"))
    for node, kind in (("datanode", "images"), ("snapnode", "boundary")):
        key = {"kind": kind, "hops": [[{"block": "seg1", "state": "x"}]] if kind == "boundary" else []}
        found = SnapshotStore(storage).open(SetSpec(key, 8, (Field("x", "float32", (2,)),), 2, 4))
        for i in range(2 if kind == "images" else 1):
            found.put(i, [np.full((4, 2), i, np.float32)])
        attempt = NodeStore(storage).attempt(node)
        attempt.write("f", b"x" * 100)
        attempt.commit({"set": found.spec.id})
    return storage


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["cache", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


def ids(storage: Storage) -> dict[str, str]:
    return {str(info.key["kind"]): info.id for info in SnapshotStore(storage).list()}


def make_old(storage: Storage, days: float = 30) -> None:
    then = time.time() - days * DAY
    for path in Path(storage.uri).rglob("*"):
        os.utime(path, (then, then))


def test_ls_and_du_show_every_set_with_its_size(store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "ls", store.uri)
    assert code == 0
    assert "after seg1" in text
    assert "1/2 shards" in text
    assert text.endswith("2 sets, " + text.rsplit("2 sets, ", 1)[1])
    code, text = call(capsys, "ls", store.uri, "--json")
    listed = {item["kind"]: item for item in json.loads(text)}
    assert {kind: (item["id"], item["shards_present"], item["shards"]) for kind, item in listed.items()} == {
        "images": (ids(store)["images"], 2, 2),
        "boundary": (ids(store)["boundary"], 1, 2),
    }
    code, text = call(capsys, "du", store.uri, "--json")
    totals = json.loads(text)
    on_disk = sum(path.stat().st_size for path in Path(store.uri).rglob("*") if path.is_file())
    assert sum(item["bytes"] for item in totals.values()) == on_disk
    assert totals["boundary sets"]["bytes"] == listed["boundary"]["bytes"]


def test_ls_names_run_and_label_where_a_plan_knows_them(
    store: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = small_plan(tmp_path)
    node = planned.sets[0]
    attempt = NodeStore(store).attempt(node.id)
    attempt.commit({"set": ids(store)["boundary"]})
    store.delete_tree("nodes/snapnode")
    write_plan(store, "my-run", planned)
    _, text = call(capsys, "ls", store.uri)
    (line,) = (line for line in text.splitlines() if "boundary" in line)
    assert line.endswith(f"my-run  {node.label}")


def damage(storage: Storage, pattern: str) -> None:
    (path,) = sorted(Path(storage.uri).glob(pattern))[:1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("sets/*/shards/*", "shard"),
        ("sets/*/commits/*", "shard"),
        ("sets/*/set.json", "set"),
        ("nodes/*/commit.json", "node"),
        ("nodes/*/attempts/*/f", "node"),
    ],
)
def test_verify_finds_damage_repairs_it_and_then_finds_none(
    store: Storage, capsys: pytest.CaptureFixture[str], pattern: str, kind: str
) -> None:
    assert call(capsys, "verify", store.uri)[0] == 0
    damage(store, pattern)
    before = {str(path) for path in Path(store.uri).rglob("*")}
    code, text = call(capsys, "verify", store.uri, "--json")
    assert code == 1
    assert [item["kind"] for item in json.loads(text)["damaged"]] == [kind]
    assert {str(path) for path in Path(store.uri).rglob("*")} == before, "looking changed something"
    code, text = call(capsys, "verify", store.uri, "--repair")
    assert (code, "1 damaged and moved aside" in text) == (0, True)
    assert list(Path(store.uri).glob("*/*/quarantine/*"))
    code, text = call(capsys, "verify", store.uri)
    assert (code, "0 damaged" in text) == (0, True)


def test_after_a_repair_the_shard_is_missing_and_the_node_not_committed(
    store: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(store, f"sets/{ids(store)['images']}/shards/000001*")
    damage(store, "nodes/snapnode/attempts/*/f")
    call(capsys, "verify", store.uri, "--repair")
    assert SnapshotStore(store).load(ids(store)["images"]).missing() == [1]
    assert NodeStore(store).commit_of("snapnode") is None
    assert NodeStore(store).commit_of("datanode") is not None


def test_verify_finds_damage_that_keeps_the_fast_checksum_of_a_record(
    store: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    # A record that lies consistently about one of the two checksums: only a full audit can see it.
    path = f"sets/{ids(store)['images']}/commits/000000.json"
    record = parse_record(store.read(path), path)
    store.write(path, dump_record({**record, "sha256": "0" * 64}, "record"))
    assert SnapshotStore(store).load(ids(store)["images"]).shard(0)[0].shape == (4, 2)
    assert call(capsys, "verify", store.uri)[0] == 1


def test_verify_finds_torn_checkpoints_and_stray_records(store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = NodeStore(store)
    nodes.save_checkpoint("running", "a1", files={"f": b"x" * 50}, position=(1,))
    damage(store, "nodes/running/checkpoints/a1/000001/f")
    store.write(f"sets/{ids(store)['images']}/commits/000009.json", b"{}")
    store.write(f"sets/{ids(store)['images']}/commits/notes.txt", b"")
    code, text = call(capsys, "verify", store.uri, "--repair", "--json")
    assert sorted(item["kind"] for item in json.loads(text)["damaged"]) == ["checkpoint", "shard", "shard"]
    assert code == 0
    assert nodes.checkpoints("running") == []
    assert call(capsys, "verify", store.uri)[0] == 0


def test_gc_deletes_what_it_said_it_would(store: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    lost = NodeStore(store).attempt("datanode")
    lost.write("f", b"x" * 1000)
    make_old(store)
    code, text = call(capsys, "gc", store.uri, "--dry-run", "--json")
    planned = [item["path"] for item in json.loads(text)["items"]]
    assert planned == [f"sets/{ids(store)['boundary']}", f"nodes/datanode/attempts/{lost.id}"]
    assert all(list(store.files(path)) for path in planned)
    assert call(capsys, "gc", store.uri, "--older-than", "60d", "--json")[1].count('"path"') == 0
    code, text = call(capsys, "gc", store.uri)
    assert code == 0
    assert "1 attempt, 1 set" in text
    assert not any(list(store.files(path)) for path in planned)
    assert call(capsys, "verify", store.uri)[0] == 0
    assert "deleted 0 B" in call(capsys, "gc", store.uri)[1]


def test_gc_goes_by_the_stores_clock(
    store: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine is decades ahead
    assert call(capsys, "gc", store.uri, "--json")[1].count('"path"') == 0


def test_rm_asks_first_and_deletes_what_was_named(
    store: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ids(store)["boundary"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert call(capsys, "rm", store.uri, target)[0] == 1
    assert target in ids(store).values()
    assert call(capsys, "rm", store.uri, target, "f" * 32, "--yes")[0] == 2
    assert target in ids(store).values()
    code, text = call(capsys, "rm", store.uri, target, "--yes")
    assert (code, text.splitlines()[-1]) == (0, "deleted 1 set")
    assert target not in ids(store).values()


@pytest.mark.parametrize("place", ["absent", "s3://KEY:hunter2@bucket/x", "ftp://x/y"])
def test_a_place_that_is_no_store_exits_with_2(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = call(capsys, "ls", place)
    assert code == 2
    assert "hunter2" not in text


def test_looking_at_a_folder_that_is_no_store_leaves_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("ls", "du", "verify", "gc"):
        assert call(capsys, command, str(tmp_path))[0] == 2
    assert os.listdir(tmp_path) == []


def test_a_run_directory_stands_for_its_store(
    store: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, {"run_dir": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.resolved(), sort_keys=False))
    code, text = call(capsys, "ls", str(tmp_path))
    assert (code, "2 sets" in text) == (0, True)
    assert call(capsys, "ls", str(tmp_path / "small.yaml"), "--json")[0] == 0


def test_facts_are_plain_values(store: Storage) -> None:
    found = store_facts(store)
    assert replace(found, now=0.0).commits == found.commits
    assert found.commits["snapnode"].sets == {ids(store)["boundary"]}
    assert len(found.listed) == 3


def test_credentials_in_a_configured_store_are_refused_and_never_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    for text, override in (
        ("s3://KEY:hunter2@b/x", ""),
        ("s3://b/x?sig=hunter2", ""),
        ("s", "store=s3://K:hunter2@b/x"),
    ):
        path.write_text(f"model: {{name: resnet18, stem: small}}\ndata: {{name: digits}}\nstore: '{text}'\n")
        assert cli.main(["run", str(path), *([override] if override else [])]) == 2
        captured = capsys.readouterr()
        assert "holds no credentials" in captured.err
        assert "hunter2" not in captured.out + captured.err
    assert sorted(os.listdir(tmp_path)) == ["x.yaml"]
