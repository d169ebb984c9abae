"""Overlapping stages: rounds that go on with the bits of the round before, averaged heads, whole runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_running import lm_changes
from planning import merged
from running import Lab, StopAfter, digests, final_digests, summary_of, write_config
from safetensors.torch import load_file

from cache_store.errors import ConfigError, Interrupted
from cache_store.records.nodes import Commit
from orchestrator.cli import main
from orchestrator.plan.graph import Node
from orchestrator.runs.prepare import prepare
from workers.tasks.average import mean
from workers.tasks.execute import execute
from workers.training import clocks

SMALL: dict[str, Any] = {"data.train_limit": 48, "split.base": 2, "data.views": 2}
WAVE: dict[str, Any] = {**SMALL, "pipeline": "wavefront", "wavefront": {"rounds": 2}}

#: Everything that a round has to hand on: dropout's random state, the adapter, moments, the place in the schedule.
CASES: dict[str, dict[str, Any]] = {
    "fp32 with dropout": {
        "model.dropout": 0.5,
        "training.schedule": {"name": "cosine", "warmup": 0.2},
        "data.views": 3,
    },
    "bf16, channels_last, clipped": {
        "training.precision": "bf16",
        "training.channels_last": True,
        "training.clip": 0.5,
    },
    "sgd with momentum, accumulation, recompute": {
        "training.optimizer": {"name": "sgd", "lr": 0.02},
        "training.accumulate": 2,
        "training.schedule": {"name": "linear"},
        "snapshots.mode": "never",
    },
    "a language model": {},
}


def lab_of(folder: Path, case: str) -> Lab:
    changes = lm_changes(folder) if case == "a language model" else SMALL
    base = {"training.epochs": 4, "training.commit": "last", "training.head_optimizer": "reset"}
    return Lab.make(folder, {**changes, **base, **CASES[case]})


def in_pieces(lab: Lab, node: Node, pieces: list[tuple[int, int]]) -> list[Commit]:
    """The commits of the node's stage, trained as rounds of these epochs, each going on where the last one stopped."""
    order = lab.order(node)
    parents, commits = dict(order.parents), list[Commit]()
    name = "".join(f"{first}{end}" for first, end in pieces)
    for first, end in pieces:
        commit = execute(
            dataclasses.replace(
                order,
                node_id=f"{node.id[:20]}{name}{first}{end}",
                task={**order.task, "round": {"first": first, "end": end}},
                parents=parents,
            ),
            lab.control,
        )
        assert commit is not None
        commits.append(commit)
        parents = {**parents, "continue": commits[-1]}
        parents |= {f"weights/{part}": commits[-1] for part in order.task["trained"]}
    return commits


@pytest.mark.parametrize("case", CASES)
def test_rounds_that_go_on_undisturbed_are_the_stage_in_one_piece_bit_for_bit(case: str, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, case)
    stage = next(node for node in lab.prepared.plan.nodes if node.label.startswith("segprop/stage2"))
    assert case == "a language model" or "adapter" in stage.task["path"]
    whole = lab.run(stage.label)
    for pieces in ([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 4)]):
        commits = in_pieces(lab, stage, pieces)
        assert digests(commits[-1]) == digests(whole)
        assert digests(commits[0]) != digests(whole)
        result = commits[-1].result
        for key in ("train_loss", "validation_loss", "lr", "epoch"):
            assert [epoch[key] for epoch in result["epochs"]] == [epoch[key] for epoch in whole.result["epochs"]]
        assert [commit.result["exit"] for commit in commits] == ["round"] * (len(pieces) - 1) + ["epochs"]
        assert (result["steps"], result["best_epoch"]) == (whole.result["steps"], whole.result["best_epoch"])
        # The last round has nobody to hand anything on to.
        assert ["continue.safetensors" in commit.files for commit in commits] == [True] * (len(pieces) - 1) + [False]
        own = sum(commit.result["seconds"] for commit in commits)
        assert own == pytest.approx(sum(e["seconds"] + e["validation_seconds"] for e in result["epochs"]))


def test_a_round_stopped_in_the_middle_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    lab = Lab.make(tmp_path / "a", {**WAVE, "training.epochs": 4, "model.dropout": 0.5})
    label = "segprop/stage2-seg3 round 2"
    expected = digests(lab.run(label))
    other = lab.linked_copy(tmp_path / "b")
    other.forget(label)
    for looks in (2, 4):
        with pytest.raises(Interrupted):
            other.run(label, StopAfter(looks))
    commit = other.run(label)
    assert digests(commit) == expected
    assert commit.result["resumed"] == 2


def test_an_average_is_the_mean_of_the_replicas_weights_and_buffers(tmp_path: Path) -> None:
    lab = Lab.make(tmp_path, {**WAVE, "training.epochs": 2})
    lab.run("segprop/average round 2")
    replicas = [lab.weights(f"segprop/{name}") for name in ("stage1-base round 2", "stage2-seg3 round 1")]
    averaged = lab.weights("segprop/average round 2")
    assert {name.partition("/")[0] for name in averaged} == {"head"}
    moved = set()
    for name, value in averaged.items():
        first, second = (replica[name] for replica in replicas)
        assert value.dtype == first.dtype
        if value.is_floating_point():
            torch.testing.assert_close(value, (first + second) / 2, rtol=1e-6, atol=1e-7)
            moved |= {name} if not torch.equal(first, second) else set()
        else:
            assert torch.equal(value, torch.maximum(first, second))
    assert {name for name in moved if "running_mean" in name}, "statistics of batch normalization are averaged too"
    # What goes on from here starts with the average, not with its own replica.
    result = lab.run("segprop/stage2-seg3 round 2").result
    assert result["exit"] == "epochs"


def test_a_mean_keeps_the_type_and_rounds_once() -> None:
    values = [torch.tensor([1.0, 3e-8, -0.0]), torch.tensor([2.0, 5e-8, 0.0]), torch.tensor([4.0, 1e-8, 0.0])]
    found = mean([{"w": value.bfloat16(), "v": value} for value in values])
    assert found["w"].dtype is torch.bfloat16
    assert found["v"].tolist() == torch.stack(values).double().mean(0).float().tolist()
    assert mean([{"n": torch.tensor(3)}, {"n": torch.tensor(7)}])["n"].item() == 7


def test_a_whole_wave_is_trained_scored_exported_and_leaves_no_snapshots(tmp_path: Path) -> None:
    config = write_config(tmp_path, {**WAVE, "training.epochs": 2, "snapshots.mode": "always"})
    assert main(["run", str(config), "--quiet"]) == 0
    summary = summary_of(tmp_path / "run")
    regime = summary["regimes"]["segprop"]
    assert [(stage["name"], stage["rounds_done"], stage["epochs"]) for stage in regime["stages"]] == [
        ("stage1-base", 2, 2),
        ("stage2-seg3", 2, 2),
        ("stage3-seg4", 2, 2),
        ("final", 1, 1),
    ]
    assert regime["final"]["metrics"]["accuracy"] > 0
    assert "in rounds that overlap" in (tmp_path / "run" / "report.html").read_text()
    prepared = prepare(config)
    # The exported file is the final weights, part by part: h ∘ F[0:n].
    exported = load_file(tmp_path / "run" / "model" / "segprop" / "model.safetensors")
    lab = Lab(prepared)
    for label in ("stage1-base round 2", "stage2-seg3 round 2", "final"):
        for name, tensor in lab.weights(f"segprop/{label}").items():
            part, _, own = name.partition("/")
            if prepared.plan.node(prepared.plan.regimes["segprop"].weights[part]).label == f"segprop/{label}":
                assert torch.equal(exported.pop(own), tensor), name
    assert exported == {}
    sets = {node.id for node in prepared.plan.sets}
    left = {path.name for path in (tmp_path / "run" / "store" / "sets").iterdir()}
    made = {lab.nodes.commit_of(node).result["set"] for node in sets}  # type: ignore[index]
    # Of two boundaries in two rounds a view and validation each; and the first view of the last version, for the end.
    assert len(made) == len(sets) == 2 * 2 * 2 + 2
    assert not made & left
    # Nothing left to do: the same command again runs nothing.
    assert main(["run", str(config), "--quiet"]) == 0
    assert summary_of(tmp_path / "run")["nodes"]["reused"] == len(prepared.plan.nodes)


def test_a_wave_on_snapshots_is_the_wave_that_recomputes_every_prefix(tmp_path: Path) -> None:
    """Whatever version of the blocks a round stands on, it is the one whose snapshots it reads."""
    found = {}
    for mode in ("always", "never"):
        changes = {**WAVE, "training.epochs": 2, "snapshots.mode": mode, "evaluation.stages": False}
        lab = Lab.make(tmp_path / mode, changes)
        assert {node.kind for node in lab.prepared.plan.nodes} >= {"average"}
        lab.run_all(("data", "model", "train"))
        found[mode] = final_digests(lab.prepared)
    assert found["always"] == found["never"]


def test_low_rank_adapters_are_refused_in_rounds_and_the_place_is_named(tmp_path: Path) -> None:
    changes = {**lm_changes(tmp_path), "training.epochs": 2, "pipeline": "wavefront", "wavefront.rounds": 2}
    regimes = {"segprop": {"stages": {"segments": {"lora": {"rank": 2}}}}}
    with pytest.raises(ConfigError, match=r"regimes\.segprop\.stages\.segments\.lora: not in a round") as caught:
        prepare(write_config(tmp_path, {**changes, "regimes": regimes}))
    assert str(caught.value).count("not in a round") == 1


@pytest.mark.parametrize("intermediate", ["omit", "frozen"])
def test_a_language_models_wave_runs_to_a_checkpoint(intermediate: str, tmp_path: Path) -> None:
    changes = merged(
        {},
        {
            **lm_changes(tmp_path),
            "training.epochs": 2,
            "training.schedule": {"name": "linear"},
            "split": {"base": 1, "head": 0, "intermediate": intermediate},
            "pipeline": "wavefront",
            "wavefront": {"rounds": 2, "average_every": 2, "final_epochs": 0},
        },
    )
    config = write_config(tmp_path, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    regime = summary_of(tmp_path / "run")["regimes"]["segprop"]
    assert [(stage["rounds_done"], stage["epochs"]) for stage in regime["stages"]] == [(2, 2)] * 3
    assert [stage["layer"] for stage in regime["stages"]] == [0, 1, 2]
    assert regime["stages"][-1]["full"]["loss"] == pytest.approx(regime["final"]["validation"]["loss"], rel=1e-4)
    first = regime["stages"][0]["curve"][0]["validation_loss"]
    assert regime["final"]["validation"]["loss"] < first
    assert (tmp_path / "run" / "model" / "segprop" / "config.json").exists()
