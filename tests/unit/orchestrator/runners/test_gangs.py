"""Which stages a gang runs, how large it is, what it refuses; and how ranks share rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from planning import SMALL, merged, small_plan

from cache_store.errors import ConfigError
from orchestrator.config.load import load
from orchestrator.config.resources import GangConfig
from orchestrator.runners.gang_size import gang_nodes, settle_gang
from orchestrator.runners.machines import Machine, Slots
from workers.distributed.gang import ALONE, Gang, Part, add_counts


@given(st.integers(0, 100), st.integers(0, 200), st.integers(1, 9))
def test_the_ranks_parts_are_the_rows_in_order_and_none_is_empty(start: int, rows: int, size: int) -> None:
    parts = [Gang(rank, size).part(start, start + rows) for rank in range(size)]
    counted = [row for part in parts if part.counts for row in range(part.rows.start, part.rows.stop)]
    assert counted == list(range(start, start + rows)), "every row counts once"
    taken = [len(range(part.rows.start, part.rows.stop)) for part in parts]
    if rows >= size:
        assert max(taken) - min(taken) <= 1
        assert all(part.copies == 1 for part in parts)
    else:
        assert all(part == Part(slice(start, start + rows), size, index == 0) for index, part in enumerate(parts)) or (
            size == 1
        )
    shares = sum(n / part.copies for n, part in zip(taken, parts, strict=True))
    assert shares == pytest.approx(rows), "weighted by its copies, what the ranks take is what there is"


def test_a_gang_of_one_says_nothing_to_nobody() -> None:
    assert ALONE.leads
    assert not ALONE.shards
    assert ALONE.loss_scale == 1
    assert ALONE.agree("mine") == "mine"
    assert ALONE.gather(3) == [3]
    assert ALONE.part(3, 3) == Part(slice(3, 3))
    assert add_counts([{"a": 1}, {"b": 2, "a": 3}]) == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    ("machines", "asked", "expected"),
    [
        # All GPUs of two machines; those that slots leave; a gang of four and what it leaves.
        ([Machine(0), Machine(8, 4), Machine(8, 4)], {"size": "auto"}, (Slots(0, 1, "cuda"), 8)),
        ([Machine(8, 4), Machine(8, 4)], {"size": "auto", "slots": 2}, (Slots(2, 1, "cuda"), 6)),
        ([Machine(8, 4), Machine(8, 4)], {"size": 6}, (Slots(2, 1, "cuda"), 6)),
        # Kept, though it cannot fit: the runner says so.
        ([Machine(8, 4)], {"size": 6, "slots": 1}, (Slots(1, 1, "cuda"), 6)),
        # On CPUs as wide as the machines allow.
        ([Machine(8)], {"size": 2}, (Slots(0, 4, "cpu"), 2)),
        ([Machine(8)], {"size": 2, "slots": 2}, (Slots(2, 2, "cpu"), 2)),
        ([Machine(8)], {"size": 2, "threads": 2}, (Slots(2, 2, "cpu"), 2)),
        ([Machine(2)], {"size": 2, "slots": 1, "threads": 1}, (Slots(1, 1, "cpu"), 2)),
        ([Machine(4), Machine(4)], {"size": "auto", "threads": 4}, (Slots(0, 4, "cpu"), 2)),
    ],
)
def test_slots_and_ranks_share_the_devices(
    machines: list[Machine], asked: dict[str, Any], expected: tuple[Slots, int]
) -> None:
    given_: dict[str, Any] = {"slots": "auto", "threads": "auto", "device": "auto", **asked}
    assert settle_gang(machines, **given_) == expected


def test_a_gang_runs_the_train_nodes_that_are_large_enough(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    trained = {node.id: node.estimate.trainable for node in plan.nodes if node.kind == "train"}
    assert gang_nodes(plan, GangConfig()) == frozenset()
    assert gang_nodes(plan, GangConfig(size=2)) == frozenset(trained)
    least = sorted(trained.values())[len(trained) // 2]
    large = gang_nodes(plan, GangConfig(size="auto", min_parameters=least))
    assert large == {node for node, count in trained.items() if count >= least}
    assert 0 < len(large) < len(trained)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"runner": "local", "gang.size": 2}, "resources.gang.size: 2: needs resources.runner ray, which is local"),
        ({"gang.size": 2, "gang.strategy": "fsdp2"}, "resources.gang.strategy: fsdp2: is for language models"),
        ({"gang.size": 2, "gang.strategy": "zero3"}, "resources.gang.strategy: zero3: is for language models"),
        (
            {"gang.size": 2, "gang.zero3.optimizer": "host"},
            "resources.gang.zero3: is for resources.gang.strategy zero3, which is ddp",
        ),
        (
            {"gang.size": 2, "gang.strategy": "zero3", "gang.zero3.optimizer": "disk"},
            "resources.gang.zero3.disk: null: parameters or optimizer are on disk",
        ),
        (
            {"gang.size": 2, "gang.strategy": "zero3", "gang.zero3.parameters": "disk", "gang.zero3.disk": "/nvme"},
            "resources.gang.zero3.optimizer: device: with parameters on disk",
        ),
        ({"gang.size": 1}, "resources.gang.size: 1"),
        ({"gang.size": 128}, "training.batch_size: 64: fewer samples than the gang has ranks (128)"),
        ({"gang.size": 2, "training.compile": True}, "training.compile: true: not in a gang"),
    ],
)
def test_what_a_gang_cannot_do_is_said_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    placed = {key if key.startswith("training") else f"resources.{key}": value for key, value in changes.items()}
    path = tmp_path / "gang.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, placed)))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert problem in caught.value.message
