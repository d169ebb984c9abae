"""Benchmarks after every stage: the scores of the exported folders, kept, and asked again where settings change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes, write_checkpoint
from running import Lab, StopAfter, summary_of, write_config
from text_makers import mmlu_folder

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install segprop[eval]")

from cache_store.errors import Interrupted
from orchestrator.cli import main
from workers.specs.results import JudgeResult

JUDGE: dict[str, Any] = {"tasks": ["mmlu"], "subjects": ["anatomy"], "shots": 0, "limit": 2, "batch_size": 4}


@dataclass
class World:
    """A finished run and the folder of its questions."""

    config: Path
    data: Path

    @property
    def run_dir(self) -> Path:
        return self.config.parent / "run"

    def answers(self, folder: Path, out: Path) -> Any:
        """What `segprop judge` says of a folder."""
        given = ["--tasks", "mmlu", "--subjects", "anatomy", "--shots", "0", "--limit", "2", "--batch-size", "4"]
        assert main(["judge", str(folder), *given, "--data", str(self.data), "--quiet", "--out", str(out)]) == 0
        [model] = json.loads(out.read_text())["models"]
        return model["scores"][0]

    def nodes(self) -> set[str]:
        return {path.parent.name for path in (self.run_dir / "store" / "nodes").glob("*/commit.json")}

    def kind(self, node: str) -> str:
        commit = json.loads((self.run_dir / "store" / "nodes" / node / "commit.json").read_text())
        return str(commit["identity"]["kind"])

    def lab(self) -> Lab:
        from orchestrator.runs.prepare import prepare

        return Lab(prepare(self.config))

    def score(self, label: str) -> Any:
        return self.lab().commit(label).read(JudgeResult).score.to_json()


def changes(folder: Path, data: Path) -> dict[str, Any]:
    return {
        **lm_changes(folder),
        "model": {"family": "causal_lm", "path": str(write_checkpoint(folder / "model", tied=True))},
        "regimes": {"e2e": {}, "segprop": {}},
        "evaluation": {"stages": False, "judge": {**JUDGE, "data": str(data)}},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("judged")
    data = folder / "data"
    mmlu_folder(data / "mmlu", ("anatomy",))
    config = write_config(folder, changes(folder, data))
    assert main(["run", str(config), "--quiet"]) == 0
    return World(config, data)


def test_a_judged_stage_scores_as_its_exported_folder(world: World, tmp_path: Path) -> None:
    for label, options in (
        ("segprop/mmlu after stage1-base", ["--regime", "segprop", "--stage", "1"]),
        ("segprop/mmlu after stage2-layer1", ["--regime", "segprop"]),
    ):
        assert main(["export", str(world.run_dir), *options]) == 0
        folder = "stages/segprop/stage1-base" if "--stage" in options else "model/segprop"
        assert world.answers(world.run_dir / folder, tmp_path / "scores.json") == world.score(label)
    original = world.answers(world.config.parent / "model", tmp_path / "scores.json")
    assert original == world.score("e2e/mmlu of the original")
    # The digests of all log-likelihoods tell the networks apart.
    digests = [
        world.score(f"segprop/mmlu after {name}")["notes"]["answers"] for name in ("stage1-base", "stage2-layer1")
    ]
    assert len({*digests, original["notes"]["answers"]}) == 3


def test_a_stage_that_is_not_there_is_said_with_those_that_are(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    for stage in ("3", "stage9"):
        assert main(["export", str(world.run_dir), "--stage", stage]) == 2
        said = capfd.readouterr().err
        assert (
            f"--stage: {stage}: there is no such stage; there are e2e: e2e; segprop: stage1-base, stage2-layer1" in said
        )


def test_judging_that_is_stopped_begins_anew(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.tasks.judge._LOOK_S", 0.0)
    lab = world.lab().linked_copy(tmp_path)
    lab.forget("segprop/mmlu after stage1-base")
    with pytest.raises(Interrupted, match="begins anew"):
        lab.run("segprop/mmlu after stage1-base", StopAfter(1))
    assert lab.run("segprop/mmlu after stage1-base").read(JudgeResult).score.to_json() == world.score(
        "segprop/mmlu after stage1-base"
    )


def test_a_network_that_a_stage_left_as_it_was_is_not_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.tasks import judge as judging

    asked: list[Path] = []
    load = judging.load_model

    def counted(folder: Path, **options: Any) -> Any:
        asked.append(folder)
        return load(folder, **options)

    monkeypatch.setattr(judging, "load_model", counted)
    settings = ["run_exit.loss=100", "evaluation.stages=true", "regimes=[segprop]", "evaluation.judge.of=[stages]"]
    run_dir = world.config.parent / "exits"
    assert main(["run", str(world.config), "--quiet", f"run_dir={run_dir}", *settings]) == 0
    first, second = summary_of(run_dir)["regimes"]["segprop"]["stages"]
    assert (second["exit"], second["judged"]) == ("run target", first["judged"])
    assert len(asked) == 1


def test_the_summary_has_the_scores_of_the_original_of_stages_and_of_regimes(world: World) -> None:
    summary = summary_of(world.run_dir)
    assert summary["judged"]["mmlu"]["n"] == 2
    for regime in ("e2e", "segprop"):
        for stage in summary["regimes"][regime]["stages"]:
            assert stage["judged"]["mmlu"]["shots"] == 0
            assert stage["judged"]["mmlu"]["stderr"] is not None


def test_what_was_judged_is_kept_and_other_settings_are_judged_anew(world: World) -> None:
    before = world.nodes()
    assert main(["run", str(world.config), "--quiet"]) == 0
    assert world.nodes() == before
    assert main(["run", str(world.config), "--quiet", "evaluation.judge.limit=3"]) == 0
    added = world.nodes() - before
    # The original, e2e, two stages of segprop.
    assert sorted(world.kind(node) for node in added) == [*["judge"] * 4, "questions"]


def test_networks_that_are_there_are_judged_afterwards_with_nothing_trained(world: World) -> None:
    """As of a run that was killed between its stages: the rest of it is not trained, and a later run goes on."""
    before = world.nodes()
    commit = world.run_dir / "store" / "nodes" / world.lab().node("segprop/stage2-layer1").id / "commit.json"
    held = json.loads(commit.read_text())
    commit.unlink()
    assert main(["judge", str(world.run_dir), "--limit", "4", "--quiet"]) == 0
    added = world.nodes() - before
    assert sorted(world.kind(node) for node in added) == [*["judge"] * 3, "questions"]
    stages = summary_of(world.run_dir)["regimes"]["segprop"]["stages"]
    assert (stages[0]["judged"]["mmlu"]["n"], "judged" in stages[1]) == (4, False)
    assert main(["run", str(world.config), "--quiet", "evaluation.judge.limit=4"]) == 0
    assert json.loads(commit.read_text())["attempt"] != held["attempt"]
    assert [world.kind(node) for node in world.nodes() - before - added] == ["judge"]
