"""Plans count what one rank of a gang holds, and say so."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from orchestrator.config.devices import DEVICES
from orchestrator.plan.graph import Node
from orchestrator.runs.dry_run import print_plan
from orchestrator.runs.fit import fit_of
from orchestrator.runs.prepare import Prepared, prepare
from workers.models.base import StageParts
from workers.models.causal_lm.gathered import gathered
from workers.models.causal_lm.inspect import inspect
from workers.models.causal_lm.kept import Types
from workers.models.causal_lm.memory import _part
from workers.models.causal_lm.outline import LMPartOutline, lm_chain
from workers.specs.experiment import TrainSpec
from workers.specs.language import CausalLMSpec
from workers.specs.memory import ON_DEVICE
from workers.specs.ranks import ONE_DEVICE, Ranks, Zero3Spec

ROOT = Path(__file__).parents[4]
SEVENTY = [f"model.path={ROOT / 'tests' / 'data' / 'llama-3.1-70b'}", "data.name=stdlib", "resources.device=cuda"]
GIB = 2**30
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}


def small(*overrides: str) -> Prepared:
    return prepare(
        ROOT / "configs" / "lm_quickstart.yaml",
        ["regimes=[segprop]", "resources.device=cuda", "split.intermediate=frozen", *overrides],
    )


def stages(prepared: Prepared) -> list[Node]:
    regime = next(iter(prepared.plan.regimes.values()))
    return [prepared.plan.node(node) for node in regime.stages]


def shown(prepared: Prepared) -> str:
    stream = io.StringIO()
    print_plan(prepared, stream)
    return " ".join(stream.getvalue().split())


def test_every_stage_of_a_70b_fits_eight_cards_of_40_gb() -> None:
    prepared = prepare(ROOT / "configs" / "llama70b_segprop.yaml", SEVENTY)
    found = stages(prepared)
    assert {node.estimate.ranks for node in found} == {8}
    # Traced among ranks that are not there (docs/will-it-fit.md).
    for index, traced in ((0, 31.72), (1, 29.59), (8, 19.14)):
        assert found[index].estimate.peak_bytes / GIB == pytest.approx(traced, rel=0.05)
    assert max(node.estimate.peak_bytes for node in found) <= 36 * GIB
    assert all(node.estimate.peak_bytes <= DEVICES["a100-40"].usable_bytes for node in found)
    # A network that is shared out is scored block by block: no device holds it.
    scoring = [node for node in prepared.plan.nodes if node.kind in ("evaluate", "materialize")]
    assert max(node.estimate.peak_bytes for node in scoring) < 20 * GIB
    alone = stages(prepare(ROOT / "configs" / "llama70b_segprop.yaml", [*SEVENTY, "resources.gang.size=null"]))
    assert [node.id for node in alone] == [node.id for node in found], "ranks are no part of what a stage is"
    assert alone[0].estimate.ranks is None
    assert alone[0].estimate.trainable == found[0].estimate.trainable


def test_the_plan_says_whose_memory_it_shows_in_text_and_json() -> None:
    prepared = small("resources.gang.size=4", "resources.gang.strategy=fsdp2")
    assert "one rank of 4 (resources.gang.strategy fsdp2)" in shown(prepared)
    assert stages(prepared)[0].estimate.to_json()["ranks"] == 4
    fit = fit_of(prepared, DEVICES["l4"])
    assert {stage["ranks"] for stage in fit.to_json()["stages"]} == {4}
    assert "rank" not in shown(small())


def test_a_size_that_nobody_knows_counts_as_one_device() -> None:
    prepared = small("resources.gang.size=auto", "resources.gang.strategy=fsdp2", "resources.accelerator=L4")
    assert "auto is counted as one device" in shown(prepared)
    assert [node.estimate.peak_bytes for node in stages(prepared)] == [
        node.estimate.peak_bytes for node in stages(small())
    ]


def test_stages_that_train_too_little_for_the_gang_are_counted_alone() -> None:
    whole = stages(small())
    least = max(node.estimate.trainable for node in whole)
    prepared = small("resources.gang.size=2", "resources.gang.strategy=fsdp2", f"resources.gang.min_parameters={least}")
    found = stages(prepared)
    assert [node.estimate.ranks for node in found] == [2 if n.estimate.trainable >= least else None for n in whole]
    assert f"({sum(n.estimate.ranks == 2 for n in found)} of {len(found)}; others train on one device)" in shown(
        prepared
    )


def test_micro_batches_are_settled_for_a_rank_and_its_part_of_the_step() -> None:
    asked = ["training.micro_batch=auto", "training.batch_size=64", "data.train_limit=640"]
    alone = stages(small(*asked, "resources.accelerator=H100"))[0]
    gang = ["resources.gang.size=4", "resources.gang.strategy=fsdp2", "resources.accelerator=H100"]
    shared = stages(small(*asked, *gang))[0]
    assert alone.task["train"]["micro_batch"] == 64
    assert shared.task["train"]["micro_batch"] == 16
    # A device that holds less: ranks, who hold less, take more of it.
    tight = ["resources.device_memory=1100000000"]
    one, four = (stages(small(*asked, *tight, *more))[0] for more in ([], gang[:2]))
    limit = (1_100_000_000 - GIB) * 0.94
    assert one.estimate.peak_bytes <= limit or one.task["train"]["micro_batch"] == 1
    assert four.task["train"]["micro_batch"] >= one.task["train"]["micro_batch"]


def parts_of() -> list[LMPartOutline]:
    chain = lm_chain(inspect(CausalLMSpec(family="causal_lm", config=LLAMA)), 32)
    return [part for part in (*chain.blocks, chain.head) if isinstance(part, LMPartOutline)]


def test_what_ranks_gather_counted_by_hand() -> None:
    types = Types.of("float32", "fp32")
    train = TrainSpec(epochs=1, batch_size=4)
    embed, first, second, third, head = (
        _part(part, part.name in ("layer1", "head"), train, types, ON_DEVICE) for part in parts_of()
    )
    path = [first, second, third, head]
    layer, last = first.weights_bytes, head.weights_bytes
    assert embed.trainable_bytes == 0
    nothing = gathered(path, ONE_DEVICE, types)
    assert nothing.forward == nothing.backward == nothing.ending == (0, 0, 0, 0)
    assert nothing.always == nothing.loss == 0

    found = gathered(path, Ranks(4, "fsdp2"), types)
    # As it arrived, and copied out of it; the last part beside the one before it.
    assert found.forward == (2 * layer, 2 * layer, 2 * layer, max(2 * last, last + layer))
    assert found.loss == last
    # Its own, the next one's that arrives, and gradients of the one behind on their way.
    assert found.backward == (layer + layer, 2 * layer, 2 * layer + last, last + layer)
    # A frozen part sends none; a trained one has them twice when they leave, its weights being gone.
    assert found.ending[1] == layer + layer + max(layer, layer)
    assert found.ending[3] == last + layer + max(last, last)

    sent = gathered(path, Ranks(4, "ddp"), types)
    assert sent.ending == (layer + last, layer + last, last, last)
    assert sent.backward == (layer + last, last, last, 0)


def test_zero3_keeps_weights_twice_and_its_buckets() -> None:
    types = Types.of("float32", "fp32")
    path = [
        _part(part, part.name in ("layer1", "head"), TrainSpec(epochs=1, batch_size=4), types, ON_DEVICE)
        for part in parts_of()[1:]
    ]
    trainable, size = sum(part.trainable for part in path), sum(part.weights_bytes for part in path)
    found = gathered(path, Ranks(2, "zero3"), types)
    assert found.always == pytest.approx(4 * trainable / 2, abs=8)
    assert set(found.forward) == {size}, "all of a small network stays gathered"
    assert set(found.backward) == {size + 2 * 4 * trainable}, "less than two buckets"
    beside = gathered(path, Ranks(2, "zero3", Zero3Spec(optimizer="host")), types)
    assert beside.always == 0
    files = gathered(path, Ranks(2, "zero3", Zero3Spec(parameters="disk", disk="/x")), types)
    assert set(files.forward) == {max(part.weights_bytes for part in path)}, "nothing is fetched ahead of its use"


def test_ranks_share_what_they_split() -> None:
    assert (ONE_DEVICE.share(10), Ranks(4, "ddp").share(10), Ranks(4, "fsdp2").share(10)) == (10, 10, 3)
    assert not Ranks(1, "fsdp2").splits
    assert Ranks(2, "ddp").replicates
    assert Ranks(2, "zero3", Zero3Spec(parameters="host")).weights_on_host
    assert not Ranks(2, "fsdp2", Zero3Spec(parameters="host")).weights_on_host
    assert StageParts((), frozenset(), TrainSpec(epochs=1, batch_size=4)).ranks == ONE_DEVICE
