"""A stage trains to the same bits wherever its frozen blocks and its activations lie, killed and resumed or not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from lm_running import LLAMA, lm_changes
from running import Lab, StopAfter, digests

from cache_store.errors import ConfigError
from workers.models import saved_activations
from workers.specs.as_json import from_json
from workers.specs.tasks import StageTask
from workers.training import clocks

#: Blocks between segment and head, and blocks before the segment that run for every micro-batch.
TEXT = {
    "model.config": {**LLAMA, "num_hidden_layers": 6},
    "regimes": ["segprop"],
    "split": {"base": 2, "head": 1, "intermediate": "frozen"},
    "snapshots.mode": "never",
    "training.micro_batch": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "text, bf16 over float32": {"training.precision": "bf16"},
    "text, low-rank": {"training.lora": {"rank": 2, "alpha": 8.0, "dropout": 0.1}},
    "text, tied": {"model.config": {**TEXT["model.config"], "tie_word_embeddings": True}, "split.embedding": "frozen"},
    "images": {"regimes": ["segprop"], "training.channels_last": True, "snapshots.mode": "never"},
}
STAGES = {"images": ("segprop/stage2-seg2", "segprop/stage3-seg3")}
TIERS: dict[str, dict[str, Any]] = {
    "frozen": {"frozen": "host"},
    "recompute": {"activations": "recompute"},
    "selective": {"activations": "selective"},
    "activations": {"activations": "host"},
    "selective, frozen": {"activations": "selective", "frozen": "host"},
    "both": {"activations": "host", "frozen": "host"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streaming")


@pytest.fixture(autouse=True)
def _small_activations_leave_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_activations, "LEAST_BYTES", 0)


def lab(folder: Path, case: str, memory: dict[str, Any] | None = None, **more: Any) -> Lab:
    base = {} if case == "images" else {**lm_changes(folder), **TEXT}
    changes = copy.deepcopy({**base, **CASES[case], **more})
    return Lab.make(folder, {**changes, "memory": memory} if memory else changes)


def trained(made: Lab, case: str) -> list[dict[str, str]]:
    labels = STAGES.get(case, ("segprop/stage1-base", "segprop/stage2-layer2"))
    return [digests(made.run(label)) for label in labels]


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {case: trained(lab(folder / "plain" / str(number), case), case) for number, case in enumerate(CASES)}


@pytest.mark.parametrize(
    ("case", "tier"),
    [
        *(("text", tier) for tier in TIERS),
        *((case, tier) for case in list(CASES)[1:] for tier in ("selective, frozen", "both")),
    ],
)
def test_every_tier_trains_to_the_bits_of_the_device(
    tmp_path: Path, plain: dict[str, list[dict[str, str]]], case: str, tier: str
) -> None:
    made = lab(tmp_path, case, TIERS[tier])
    assert made.node("segprop/stage1-base").task["memory"] is not None
    assert trained(made, case) == plain[case]


@pytest.mark.parametrize("case", ["text, low-rank", "images"])
def test_a_killed_stage_goes_on_to_the_bits_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: dict[str, list[dict[str, str]]], case: str
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    made = lab(tmp_path, case, TIERS["both"], **{"training.checkpoint_every_s": 1e-6})
    label = STAGES.get(case, ("", "segprop/stage2-layer2"))[1]
    made.prepare(label)
    with pytest.raises(RuntimeError, match="crashed"):
        made.run(label, StopAfter(3, RuntimeError))
    resumed = made.run(label)
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == plain[case][1]


@pytest.mark.parametrize("case", ["text", "text, tied", "images"])
def test_scores_and_snapshots_are_those_of_weights_on_the_device(tmp_path: Path, case: str) -> None:
    more = {"snapshots.mode": "always", "evaluation": {"stages": True}}
    found = []
    for name, memory in (("device", None), ("host", {"frozen": "host"})):
        made = lab(tmp_path / name, case, memory, **more)
        stage = "stage2-seg2" if case == "images" else "stage2-layer2"
        nodes = [node for node in made.prepared.plan.nodes if node.kind in ("evaluate", "materialize")]
        assert {node.task.get("frozen") for node in nodes} == {memory and "host"}
        made.prepare(f"segprop/{stage}")
        sets = {node.label: node.id for node in nodes if node.kind == "materialize"}
        scored = made.run(f"segprop/assembled after {stage}").result["metrics"]
        found.append((sets, digests(made.run(f"segprop/{stage}")), scored))
    assert found[0] == found[1]


def test_where_things_lie_is_no_part_of_a_stage_s_identity(tmp_path: Path) -> None:
    ids = {tier: lab(tmp_path / tier, "text", TIERS[tier]).node("segprop/stage2-layer2").id for tier in TIERS}
    assert set(ids.values()) == {lab(tmp_path / "plain", "text").node("segprop/stage2-layer2").id}


def test_resident_weights_leave_out_what_lies_on_the_host(tmp_path: Path) -> None:
    found = [
        lab(tmp_path / name, "text", memory).run("segprop/stage2-layer2").result["resident_bytes"]
        for name, memory in (("device", None), ("host", {"frozen": "host"}))
    ]
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    # Embedding and two layers before the segment, two layers behind it.
    assert found[0] - found[1] == 4 * 260 * 32 + 4 * layer


@pytest.mark.parametrize(
    ("memory", "more", "message"),
    [
        ({"frozen": "host"}, {"training.frozen_weights": "int8"}, r"memory\.frozen: host: not with training\.frozen_w"),
        ({"frozen": "host"}, {"training.compile": True}, r"memory\.frozen: host: not with training\.compile"),
        ({"activations": "host"}, {"training.compile": True}, r"memory\.activations: host: not with training\.comp"),
        ({"activations": "selective"}, {"training.compile": True}, r"selective: not with training\.compile.*recompute"),
        ({"frozen": "host"}, "gang", r"memory\.frozen: host: not with resources\.gang\.strategy fsdp2"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_plan(
    tmp_path: Path, memory: dict[str, Any], more: Any, message: str
) -> None:
    gang = {"resources": {"runner": "ray", "device": "cpu", "gang": {"size": 2, "strategy": "fsdp2"}}}
    with pytest.raises(ConfigError, match=message):
        lab(tmp_path, "text", memory, **(gang if more == "gang" else more))


def test_activations_say_more_than_activation_checkpointing(tmp_path: Path) -> None:
    both = {"training.activation_checkpointing": True}
    made = lab(tmp_path, "text", {"activations": "selective"}, **both)
    task = from_json(StageTask, made.node("segprop/stage2-layer2").task)
    assert task.activations == "selective"
    task = from_json(StageTask, lab(tmp_path, "text", **both).node("segprop/stage2-layer2").task)
    assert task.activations == "recompute"


def test_everything_beside_the_device_at_once_trains_to_the_bits_of_states_on_the_host_alone(tmp_path: Path) -> None:
    alone = trained(lab(tmp_path / "alone", "text", {"optimizer": "host"}), "text")
    assert trained(lab(tmp_path / "all", "text", {**TIERS["both"], "optimizer": "host"}), "text") == alone
