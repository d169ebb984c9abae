"""A stage over two processes: the numbers of one, the same bits again after a kill, nothing written by the second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import lm_changes
from ranks import Ranks
from running import Lab

from workers import specs
from workers.domains import domain_of
from workers.orders import Strategy
from workers.specs import StageTask
from workers.weights import Weights

#: Unpacked text: samples, so also ranks, have different numbers of targets. A last batch that does not divide by two.
TEXT: dict[str, Any] = {
    "data.pack": False,
    "data.train_limit": 27,
    "training.drop_last": False,
    "training.epochs": 2,
    "training.clip": 1.0,
    "regimes": ["segprop", "lw", "e2e"],
}


#: From tokens, from snapshots, with a local head, of the head alone (whose inputs need no gradient), of everything.
STAGES = ["segprop/stage1-base", "segprop/stage2-layer1", "lw/stage2-layer1", "lw/head", "e2e/e2e"]


def in_gang(lab: Lab, ranks: Ranks, label: str, strategy: Strategy, **options: Any) -> list[Any]:
    """The node on all ranks, after whatever it needs."""
    node = lab.node(label)
    for parent in node.parents.values():
        if lab.nodes.commit_of(parent) is None:
            lab._run(lab.prepared.plan.node(parent))
    return ranks.run(replace(lab.order(node), strategy=strategy), **options)


def start_of(lab: Lab, label: str) -> dict[str, torch.Tensor]:
    """The weights a train node starts from, named like those it commits."""
    order = lab.order(lab.node(label))
    task = specs.from_json(StageTask, order.task)
    weights = Weights(lab.nodes, order.parents, domain_of(task.experiment), torch.device("cpu"))
    return {f"{part}/{name}": tensor for part in task.trained for name, tensor in weights.state(part).items()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Of two trained states, by how much they differ, in parts of how far training moved."""
    assert ours.keys() == theirs.keys()
    floats = [name for name in ours if ours[name].is_floating_point()]
    apart = sum((ours[name].double() - theirs[name].double()).square().sum() for name in floats)
    moved = sum((theirs[name].double() - start[name].double()).square().sum() for name in floats)
    assert float(moved) > 0
    return float((apart / moved).sqrt())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Every stage of a tiny Llama on one device."""
    folder = tmp_path_factory.mktemp("text")
    lab = Lab.make(folder, {**lm_changes(folder), **TEXT})
    lab.run_all(("data", "model", "train", "materialize"))
    return lab


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("label", STAGES)
def test_two_ranks_come_to_the_weights_of_one_device(
    tmp_path: Path, single: Lab, ranks: Ranks, label: str, strategy: Strategy
) -> None:
    lab = single.linked_copy(tmp_path)
    lab.forget(label)
    first, second = in_gang(lab, ranks, label, strategy)
    assert first == second == lab.commit(label)
    d = distance(lab.weights(label), single.weights(label), start_of(lab, label))
    print(label, strategy, d)
