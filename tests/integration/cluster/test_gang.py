"""A stage over two processes: the numbers of one, the same bits again after a kill, nothing written by the second."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import LLAMA, lm_changes
from ranks import DEEPSPEED, Ranks
from running import Lab, digests

from cache_store.errors import Interrupted, SegpropError, TrainingDiverged
from workers.distributed.gang import lost_contact
from workers.domains.registry import domain_of
from workers.models import saved_activations
from workers.specs import as_json
from workers.specs.memory import Activations
from workers.specs.ranks import ON_DEVICE, Strategy, Zero3Spec
from workers.specs.tasks import StageTask
from workers.tasks import execute
from workers.weights import Weights

#: Seconds where nothing else runs; a process takes a minute to start where much does.
pytestmark = pytest.mark.timeout(900)

#: Unpacked text: samples, so also ranks, have different numbers of targets. A last batch that does not divide by two.
TEXT: dict[str, Any] = {
    "data.pack": False,
    "data.train_limit": 27,
    "training.drop_last": False,
    "training.epochs": 2,
    "training.clip": 1.0,
    "regimes": ["segprop", "lw", "e2e"],
}


#: Two ranks add up in another order than one device, and AdamW makes steps of equal length from gradients near zero:
#: 2e-7 to 2e-5 was seen. With batch normalization, whose own statistics are summed in another order, more.
TOLERANCE = 1e-4
NORM_TOLERANCE = 1e-2

#: From tokens, from snapshots, with a local head, of the head alone (whose inputs need no gradient), of everything.
STAGES = ["segprop/stage1-base", "segprop/stage2-layer1", "lw/stage2-layer1", "lw/head", "e2e/e2e"]


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and not DEEPSPEED.is_dir(),
    reason="needs DeepSpeed, which `make setup` installs",
)
ZERO3 = pytest.param("zero3", marks=needs_deepspeed)


def in_gang(
    lab: Lab,
    ranks: Ranks,
    label: str,
    strategy: Strategy,
    zero3: Zero3Spec = ON_DEVICE,
    *,
    activations: Activations | None = None,
    **options: Any,
) -> list[Any]:
    """The node on all ranks, after whatever it needs. `activations`: instead of what its task says."""
    node = lab.node(label)
    for parent in node.parents.values():
        if lab.nodes.commit_of(parent) is None:
            lab._run(lab.prepared.plan.node(parent))
    order = replace(lab.order(node), strategy=strategy, zero3=zero3)
    if activations is not None:
        memory = {**(order.task.get("memory") or {}), "activations": activations}
        order = replace(order, task={**order.task, "memory": memory})
    return ranks.run(order, **options)


def start_of(lab: Lab, label: str) -> dict[str, torch.Tensor]:
    """The weights a train node starts from, named like those it commits."""
    order = lab.order(lab.node(label))
    task = as_json.from_json(StageTask, order.task)
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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", ZERO3])
@pytest.mark.parametrize("label", STAGES)
def test_two_ranks_come_to_the_weights_of_one_device(
    tmp_path: Path, single: Lab, ranks: Ranks, label: str, strategy: Strategy
) -> None:
    lab = single.linked_copy(tmp_path)
    lab.forget(label)
    first, second = in_gang(lab, ranks, label, strategy)
    commit = lab.commit(label)
    assert first == second == commit
    assert distance(lab.weights(label), single.weights(label), start_of(lab, label)) < TOLERANCE
    assert_same_figures(commit.result, single.commit(label).result)
    assert commit.result["where"]["world_size"] == 2
    assert commit.result["where"]["strategy"] == strategy
    assert len({rank["pid"] for rank in commit.result["where"]["ranks"]}) == 2
    attempts = Path(lab.store) / "nodes" / lab.node(label).id / "attempts"
    assert {path.name for path in attempts.iterdir()} >= {commit.attempt}
    assert len(list(attempts.iterdir())) == 2, "the single device's and the first rank's; the second wrote nothing"


def assert_same_figures(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """What a stage says of itself does not depend on how many devices it ran on."""
    for key in ("steps", "exit", "trainable_parameters", "forwards", "committed_epoch"):
        assert ours[key] == theirs[key], key
    assert ours["snapshot"]["bytes_read"] == theirs["snapshot"]["bytes_read"]
    assert ours["snapshot"]["misses"] == theirs["snapshot"]["misses"] == 0
    for our, their in zip(ours["epochs"], theirs["epochs"], strict=True):
        for key in ("train_loss", "validation_loss", "validation_accuracy"):
            assert our[key] == pytest.approx(their[key], rel=1e-5), key


def test_weights_of_two_types_are_split_over_the_ranks(tmp_path: Path, ranks: Ranks) -> None:
    """FSDP2 itself takes weights of one type; transformers names norms of this model that stay in float32."""
    config = {**LLAMA, "model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 8, "pad_token_id": None}
    changes = {**lm_changes(tmp_path), "model.config": config, "model.master": "bfloat16", "data.isolate": False}
    lab = Lab.make(tmp_path / "alone", {**changes, "regimes": ["e2e"]})
    alone = lab.run("e2e/e2e").result["epochs"][-1]
    lab = Lab.make(tmp_path / "together", {**changes, "regimes": ["e2e"]})
    first, second = in_gang(lab, ranks, "e2e/e2e", "fsdp2")
    assert first == second == lab.commit("e2e/e2e")
    assert first.result["epochs"][-1]["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-2)
    kinds = {tensor.dtype for tensor in lab.weights("e2e/e2e").values()}
    assert kinds == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", ZERO3])
def test_ranks_train_a_tied_embedding_and_lm_head_as_one_matrix(
    tmp_path: Path, ranks: Ranks, strategy: Strategy
) -> None:
    config = {**LLAMA, "tie_word_embeddings": True}
    changes = {**lm_changes(tmp_path), **TEXT, "model.config": config, "training.commit": "best", "regimes": ["e2e"]}
    alone = Lab.make(tmp_path / "alone", changes)
    alone.prepare("e2e/e2e")
    lab, killed = alone.linked_copy(tmp_path / "together"), alone.linked_copy(tmp_path / "killed")
    theirs = alone.run("e2e/e2e")
    first, second = in_gang(lab, ranks, "e2e/e2e", strategy)
    assert first == second == lab.commit("e2e/e2e")
    weights = lab.weights("e2e/e2e")
    assert torch.equal(weights["head/lm_head.weight"], weights["embed/model.embed_tokens.weight"])
    assert distance(weights, alone.weights("e2e/e2e"), start_of(lab, "e2e/e2e")) < TOLERANCE
    assert_same_figures(first.result, theirs.result)
    # Stopped and resumed, it keeps its bits.
    for error in in_gang(killed, ranks, "e2e/e2e", strategy, looks=2):
        assert isinstance(error, Interrupted)
    assert digests(in_gang(killed, ranks, "e2e/e2e", strategy)[0]) == digests(first)


@pytest.fixture(scope="module")
def adapting(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Stages that train low-rank adapters, of the LM head too, with the state of the head's carried on."""
    folder = tmp_path_factory.mktemp("adapting")
    lora = {"training.lora": {"rank": 2}, "training.lm_head": "lora", "training.checkpoint_every_s": 1e-6}
    lab = Lab.make(folder, {**lm_changes(folder), **TEXT, **lora, "regimes": ["segprop"]})
    lab.run_all(("data", "model", "train", "materialize"))
    return lab


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("label", ["segprop/stage1-base", "segprop/stage2-layer1"])
def test_two_ranks_train_low_rank_adapters_as_one_device_does_and_after_a_stop(
    tmp_path: Path, adapting: Lab, ranks: Ranks, label: str, strategy: Strategy
) -> None:
    lab, stopped = adapting.linked_copy(tmp_path / "whole"), adapting.linked_copy(tmp_path / "stopped")
    for copy in (lab, stopped):
        copy.forget(label)
    first, second = in_gang(lab, ranks, label, strategy)
    assert first == second == lab.commit(label), (first, second)
    assert distance(lab.weights(label), adapting.weights(label), start_of(lab, label)) < TOLERANCE
    assert_same_figures(first.result, adapting.commit(label).result)
    kept, theirs = first.result["adapters"], adapting.commit(label).result["adapters"]
    assert {part: each["bytes"] for part, each in kept.items()} == {p: each["bytes"] for p, each in theirs.items()}
    for error in in_gang(stopped, ranks, label, strategy, looks=2):
        assert isinstance(error, Interrupted), repr(error)
    resumed = in_gang(stopped, ranks, label, strategy)[0]
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(first)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Stages of a ResNet without dropout on one device; micro-batches of 12 samples, so that ranks do share them."""
    lab = Lab.make(
        tmp_path_factory.mktemp("images"),
        {"model.dropout": 0.0, "data.train_limit": 56, "training.batch_size": 24, "training.accumulate": 2},
    )
    lab.run_all(("data", "model"))
    for label in ("segprop/stage1-base", "segprop/stage2-seg2"):
        lab.run(label)
    return lab


@pytest.mark.parametrize("label", ["segprop/stage1-base", "segprop/stage2-seg2"])
def test_batch_normalization_sees_the_micro_batch_of_all_ranks(
    tmp_path: Path, images: Lab, ranks: Ranks, label: str
) -> None:
    lab = images.linked_copy(tmp_path)
    lab.forget(label)
    for report in in_gang(lab, ranks, label, "ddp"):
        assert report == lab.commit(label)
    ours, theirs = lab.weights(label), images.weights(label)
    assert distance(ours, theirs, start_of(lab, label)) < NORM_TOLERANCE, "running statistics are among them"
    counts = [name for name in ours if name.endswith("num_batches_tracked")]
    assert counts
    assert all(torch.equal(ours[name], theirs[name]) for name in counts), "a micro-batch counts once, not once a rank"


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """What a checkpoint must hold to go on: masks of both ranks, the best weights so far, the optimizer."""
    folder = tmp_path_factory.mktemp("dropping")
    changes = {
        **lm_changes(folder),
        **TEXT,
        "training.activation_checkpointing": True,
        "training.commit": "best",
        "training.head_optimizer": "carry",
        "training.checkpoint_every_s": 1e-6,
        "model.config": {**LLAMA, "attention_dropout": 0.2},
        "regimes": ["segprop"],
    }
    lab = Lab.make(folder, changes)
    lab.run_all(("data", "model"))
    return lab


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", ZERO3])
def test_a_gang_whose_rank_was_killed_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, dropping: Lab, ranks: Ranks, strategy: Strategy
) -> None:
    label = "segprop/stage1-base"
    lab, killed = dropping.linked_copy(tmp_path / "whole"), dropping.linked_copy(tmp_path / "killed")
    whole = in_gang(lab, ranks, label, strategy)[0]
    assert whole.result["resumed"] == 0
    # In the second epoch of two, after a checkpoint in the middle of the first and one at its end.
    with Ranks(tmp_path, crash=f"stage.step:6:{tmp_path / 'crashed'}") as doomed:
        survivor, dead = in_gang(killed, doomed, label, strategy)
    assert dead is None
    assert lost_contact(survivor), repr(survivor)
    assert killed.nodes.commit_of(killed.node(label).id) is None
    resumed = in_gang(killed, ranks, label, strategy)[0]
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(whole)
    carried = "optimizer.safetensors"
    assert resumed.files[carried].sha256 == whole.files[carried].sha256


@pytest.mark.parametrize("strategy", ["fsdp2", ZERO3])
def test_a_gang_that_is_told_to_stop_goes_on_alone_from_its_checkpoint(
    tmp_path: Path, single: Lab, ranks: Ranks, strategy: Strategy
) -> None:
    label = "e2e/e2e"
    lab = single.linked_copy(tmp_path)
    lab.forget(label)
    for error in in_gang(lab, ranks, label, strategy, looks=2):
        assert isinstance(error, Interrupted)
    kept = lab.nodes.latest_checkpoint(lab.node(label).id)
    assert kept is not None
    commit = lab.run(label)
    assert commit.result["resumed"] == 1
    assert commit.result["where"]["world_size"] == 1
    assert distance(lab.weights(label), single.weights(label), start_of(lab, label)) < TOLERANCE


@needs_deepspeed
@pytest.mark.parametrize(
    "zero3",
    [Zero3Spec(parameters="host"), Zero3Spec(parameters="host", optimizer="host")],
    ids=["parameters on the host", "all on the host"],
)
def test_zero3_beside_the_device_is_stopped_resumed_and_comes_to_the_weights_of_one_device(
    tmp_path: Path, single: Lab, ranks: Ranks, zero3: Zero3Spec
) -> None:
    label = "e2e/e2e"
    lab, stopped = single.linked_copy(tmp_path / "whole"), single.linked_copy(tmp_path / "stopped")
    for copy in (lab, stopped):
        copy.forget(label)
    commit = in_gang(lab, ranks, label, "zero3", zero3)[0]
    assert distance(lab.weights(label), single.weights(label), start_of(lab, label)) < TOLERANCE
    assert_same_figures(commit.result, single.commit(label).result)
    for error in in_gang(stopped, ranks, label, "zero3", zero3, looks=2):
        assert isinstance(error, Interrupted), repr(error)
    resumed = in_gang(stopped, ranks, label, "zero3", zero3)[0]
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(commit)


#: DeepSpeed leaves in memory what is less than 1 MiB of a rank: of these layers the MLP's matrices are more, and
#: the optimizer's pieces; the embedding is less of both.
WIDE = {**LLAMA, "hidden_size": 128, "intermediate_size": 4096, "num_hidden_layers": 2, "initializer_range": 0.05}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A Llama with matrices large enough for files, on one device."""
    folder = tmp_path_factory.mktemp("wide")
    changes = {**lm_changes(folder), **TEXT, "model.config": WIDE, "regimes": ["e2e"], "training.commit": "best"}
    lab = Lab.make(folder, {**changes, "training.checkpoint_every_s": 1e-6, "training.optimizer.lr": 1e-3})
    lab.prepare("e2e/e2e")
    lab.run("e2e/e2e")
    return lab


@needs_deepspeed
@pytest.mark.parametrize(
    "places", [{"parameters": "disk", "optimizer": "disk"}, {"parameters": "host", "optimizer": "disk"}], ids=str
)
def test_zero3_in_files_is_killed_resumed_and_comes_to_the_weights_of_one_device(
    tmp_path: Path, wide: Lab, ranks: Ranks, places: dict[str, Any]
) -> None:
    label, disk = "e2e/e2e", tmp_path / "nvme"
    zero3 = Zero3Spec(**places, disk=str(disk))
    lab, killed = wide.linked_copy(tmp_path / "whole"), wide.linked_copy(tmp_path / "killed")
    for copy in (lab, killed):
        copy.forget(label)
    whole = in_gang(lab, ranks, label, "zero3", zero3)[0]
    assert distance(lab.weights(label), wide.weights(label), start_of(lab, label)) < TOLERANCE
    assert_same_figures(whole.result, wide.commit(label).result)
    assert not list(disk.iterdir()), "files go with the stage"
    with Ranks(tmp_path, crash=f"stage.step:6:{tmp_path / 'crashed'}") as doomed:
        survivor, dead = in_gang(killed, doomed, label, "zero3", zero3)
        assert dead is None
        assert lost_contact(survivor), repr(survivor)
        left = [path for path in disk.rglob("*.swp") if path.stat().st_size >= 1 << 20]
        assert left, "the killed rank could not remove its files"
    resumed = in_gang(killed, ranks, label, "zero3", zero3)[0]
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(whole)
    assert not list(disk.iterdir()), "what the killed rank left is gone, too"


@pytest.mark.parametrize("activations", ["selective", "host"])
@pytest.mark.parametrize("strategy", ["fsdp2", ZERO3])
def test_ranks_that_share_weights_out_have_the_bits_of_activations_that_stay(
    tmp_path: Path, single: Lab, ranks: Ranks, strategy: Strategy, activations: Activations
) -> None:
    label = "e2e/e2e"
    kept, moved = single.linked_copy(tmp_path / "kept"), single.linked_copy(tmp_path / "moved")
    for copy in (kept, moved):
        copy.forget(label)
    expected = in_gang(kept, ranks, label, strategy)[0]
    found = in_gang(moved, ranks, label, strategy, activations=activations, meddle=small_ones_leave_too)[0]
    assert digests(found) == digests(expected)


def small_ones_leave_too() -> None:
    """On the rank: this network's activations are smaller than what is worth a copy."""
    saved_activations.LEAST_BYTES = 0


def test_a_loss_that_is_not_finite_on_one_rank_is_everybodys(tmp_path: Path, ranks: Ranks) -> None:
    label = "segprop/stage1-base"
    bursting = {"name": "sgd", "lr": 1e6, "weight_decay": 1e30}
    lab = Lab.make(tmp_path, {**lm_changes(tmp_path), **TEXT, "regimes": ["segprop"], "training.optimizer": bursting})
    for error in in_gang(lab, ranks, label, "ddp"):
        assert isinstance(error, TrainingDiverged)
        assert "stage1-base" in str(error)


def test_an_order_for_a_gang_is_refused_outside_one(tmp_path: Path, single: Lab) -> None:
    lab = single.linked_copy(tmp_path)
    order = replace(lab.order(lab.node("e2e/e2e")), strategy="ddp")
    with pytest.raises(SegpropError, match="belongs to none"):
        execute.execute(order, lab.control)
