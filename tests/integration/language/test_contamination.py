"""A model that was trained on questions it is to be judged by: recorded by the run, found by the judge."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes, write_checkpoint
from running import write_config
from text_makers import mmlu_folder

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install segprop[eval]")

from orchestrator.cli import main
from orchestrator.runs.prepare import prepare
from workers.specs.export_files import TRAINED_QUESTIONS

STORY = "After the long walk home the tired man sat down by the old stone well and asked for some water"
SAME = [f"{STORY} from whom", "his wife", "a child", "the smith", "nobody"]
NEAR = [f"{STORY} and why", "thirst", "habit", "custom", "fear"]


@dataclass
class World:
    """A finished run, the folder of its data and that of its model."""

    config: Path
    data: Path
    model: Path

    def judge(self, *options: str, model: Path | None = None) -> int:
        given = ["--tasks", "mmlu", "--subjects", "anatomy", "--shots", "0", "--data", str(self.data), "--quiet"]
        return main(["judge", str(model or self.model), *given, *options])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """MMLU with one question in its training and its test files, and one that shares a sentence with it."""
    folder = tmp_path_factory.mktemp("contaminated")
    data = folder / "data"
    root = Path(mmlu_folder(data / "mmlu", ("anatomy",), training=30))
    append(root / "auxiliary_train" / "race.csv", [[*SAME, "A"]])
    append(root / "test" / "anatomy_test.csv", [[*SAME, 0], [*NEAR, 1]])
    return run(folder, data, write_checkpoint(folder / "model"), str(root))


def run(folder: Path, data: Path, model: Path, path: str) -> World:
    changes = {
        **lm_changes(folder),
        "model": {"family": "causal_lm", "path": str(model)},
        "data": {"name": "mmlu", "path": path, "sequence_length": 128, "allow_loss": True},
        "regimes": {"e2e": {}},
    }
    config = write_config(folder, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    return World(config, data, folder / "run" / "model" / "e2e")


def append(path: Path, rows: list[list[Any]]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)


def test_an_export_says_what_it_was_trained_on(world: World) -> None:
    assert json.loads((world.model / "segprop.json").read_text())["questions"] == TRAINED_QUESTIONS
    assert (world.model / TRAINED_QUESTIONS).stat().st_size < 20_000


def test_what_an_export_copies_is_made_again_where_it_was_lost(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """The import's companions and the digests of the questions are in commits that no unfinished stage reads."""
    run_dir = world.config.parent / "run"
    whole = {path.name: path.read_bytes() for path in world.model.iterdir()}
    # Damaged: said with what to do, which brings it back.
    (damaged,) = (run_dir / "store" / "nodes").glob("*/attempts/*/companion-config.json")
    damaged.write_bytes(damaged.read_bytes() + b" ")
    (world.model / "config.json").unlink()
    assert main(["export", str(run_dir)]) == 1
    said = capfd.readouterr().err
    assert f"segprop cache verify {run_dir} --repair" in said
    assert main(["cache", "verify", str(run_dir), "--repair"]) in (0, 1)
    assert main(["export", str(run_dir)]) == 2
    assert "run it first" in capfd.readouterr().err
    assert main(["run", str(world.config), "--quiet"]) == 0
    assert {path.name: path.read_bytes() for path in world.model.iterdir()} == whole
    # Lost: the commits of data and import, whichever they are.
    for node in prepare(world.config).plan.nodes:
        if not node.parents:
            (run_dir / "store" / "nodes" / node.id / "commit.json").unlink()
    (world.model / TRAINED_QUESTIONS).unlink()
    assert main(["run", str(world.config), "--quiet"]) == 0
    assert {path.name: path.read_bytes() for path in world.model.iterdir()} == whole


def test_a_model_is_not_judged_by_what_it_was_trained_on(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert world.judge() == 2
    said = " ".join(capfd.readouterr().err.split())
    for words in ("mmlu: it was trained on 1 of the 11 questions", "of 1 others", STORY[:60], "--allow-contaminated"):
        assert words in said


def test_asked_to_the_judge_marks_the_score(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert world.judge("--allow-contaminated", "--out", str(out)) == 0
    [model] = json.loads(out.read_text())["models"]
    [score] = model["scores"]
    noted = score["notes"]["contaminated"]
    assert (noted["asked"], noted["same"], noted["near"]) == (11, 1, 1)
    assert "e2e: mmlu: it was trained on 1 of the 11 questions" in " ".join(capfd.readouterr().out.split())


def test_questions_that_were_not_trained_on_are_judged(world: World, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert world.judge("--limit", "9", "--out", str(out)) == 0
    [score] = json.loads(out.read_text())["models"][0]["scores"]
    assert "contaminated" not in score["notes"]


def test_a_run_judges_by_no_questions_it_trains_on_unless_it_is_asked_to(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found before anything is judged; the untouched model was trained on none of them."""
    judge = {
        "tasks": ["mmlu"],
        "subjects": ["anatomy"],
        "shots": 0,
        "data": str(world.data),
        "of": ["original", "final"],
    }
    asked = [str(world.config), "--quiet", f"evaluation.judge={json.dumps(judge)}"]
    assert main(["run", *asked]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "mmlu: the model is trained on 1 of the 11 questions it is to be judged by" in said
    assert "evaluation.judge.allow_contaminated: true judges it all the same" in said
    summary = json.loads((world.config.parent / "run" / "summary.json").read_text())
    assert (summary["judged"]["mmlu"]["n"], "judged" in summary["regimes"]["e2e"]["stages"][0]) == (11, False)
    assert main(["run", *asked, "evaluation.judge.allow_contaminated=true"]) == 0
    summary = json.loads((world.config.parent / "run" / "summary.json").read_text())
    marked = summary["regimes"]["e2e"]["stages"][0]["judged"]["mmlu"]
    assert marked["contaminated"] == {"asked": 11, "same": 1, "near": 1}
    assert "contaminated" not in summary["judged"]["mmlu"]
    assert "* trained on 1 of them" in capfd.readouterr().out


def test_what_a_model_was_trained_on_before_stays_known(world: World, tmp_path: Path) -> None:
    """The export is trained further, on other questions."""
    other = mmlu_folder(tmp_path / "other", ("anatomy",), training=30)
    further = run(tmp_path, world.data, world.model, other)
    assert world.judge(model=further.model) == 2


def test_digests_that_are_gone_or_broken_are_named(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in world.model.iterdir():
        if file.name != TRAINED_QUESTIONS:
            (model / file.name).symlink_to(file)
    assert world.judge(model=model) == 2
    assert f"{TRAINED_QUESTIONS}: cannot be read" in " ".join(capfd.readouterr().err.split())
    (model / TRAINED_QUESTIONS).write_bytes(b"PK")
    assert world.judge(model=model) == 2
    assert "holds no digests of questions" in " ".join(capfd.readouterr().err.split())
