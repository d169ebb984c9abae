"""Whole runs in this process: growing, repeating and refusing them, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import ROOT, final_digests, summary_of, tree, write_config

from cache_store.records.nodes import NodeStore
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.runs import session
from orchestrator.runs.prepare import Prepared, prepare
from workers.data.images.source import ImageSource
from workers.domains.registry import domain_of
from workers.models.chain import ModulePath as ChainPath
from workers.specs import as_json
from workers.specs.data_results import ImageDataResult
from workers.specs.tasks import EvaluateTask
from workers.weights import Weights

BASE: dict[str, Any] = {"data.views": 2}
GROWN: dict[str, Any] = {
    **BASE,
    "regimes": {"segprop": {}, "e2e": {}, "lw": {}, "never": {"kind": "segprop", "snapshots": {"mode": "never"}}},
}


def run(config: Path, *arguments: str) -> int:
    return main(["run", str(config), "--quiet", *arguments])


@dataclass
class Story:
    """One run directory: first SegProp alone, then with three more regimes."""

    folder: Path
    config: Path
    codes: list[int] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def prepared(self) -> Prepared:
        return prepare(self.config)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    made = Story(folder, write_config(folder, GROWN))
    for config in (write_config(folder, BASE, "small"), made.config):
        made.codes.append(run(config, "run=story"))
        made.summaries.append(summary_of(made.run_dir))
    return made


def test_adding_regimes_to_a_finished_run_reuses_what_is_there(story: Story) -> None:
    assert story.codes == [0, 0]
    first, second = story.summaries
    assert first["nodes"] == {"total": first["nodes"]["done"], "done": first["nodes"]["done"], "reused": 0, "failed": 0}
    assert second["nodes"]["reused"] == first["nodes"]["done"]
    assert second["nodes"]["done"] == second["nodes"]["total"] > first["nodes"]["total"]
    assert {name: regime["status"] for name, regime in second["regimes"].items()} == {
        "segprop": "reused",
        "e2e": "done",
        "lw": "done",
        "never": "done",
    }
    assert all(stage["reused"] for stage in second["regimes"]["segprop"]["stages"])
    # Base prefix and head of both SegProp regimes are one stage, trained once.
    assert second["regimes"]["never"]["stages"][0]["reused"]


def test_a_finished_run_again_reuses_everything_and_starts_no_runner(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(story.run_dir / "store"), tree(story.run_dir / "model")

    def refuse(prepared: Prepared) -> None:
        raise AssertionError("a runner was started")

    monkeypatch.setattr(session, "make_runner", refuse)
    assert run(story.config, "run=story") == 0
    summary = summary_of(story.run_dir)
    assert summary["nodes"]["reused"] == summary["nodes"]["total"]
    assert {regime["status"] for regime in summary["regimes"].values()} == {"reused"}
    assert (tree(story.run_dir / "store"), tree(story.run_dir / "model")) == before


def test_a_damaged_export_is_written_again_by_run_and_export(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    folder = story.run_dir / "model" / "segprop"
    weights = folder / "model.safetensors"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights.write_bytes(whole["model.safetensors"][:-4] + b"\0\0\0\1")
    assert run(story.config, "run=story") == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    before = weights.stat().st_mtime_ns
    assert main(["export", str(story.run_dir), "--regime", "segprop"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert weights.stat().st_mtime_ns > before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize(
    "override",
    ["training.epochs=3", "regimes=[segprop]", "seed=1"],
)
def test_a_run_directory_with_another_configuration_is_refused_and_left_alone(
    story: Story, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(story.run_dir)
    assert run(story.config, "run=story", override) == 2
    assert "holds another configuration" in capsys.readouterr().err
    assert tree(story.run_dir) == before


def test_each_frozen_block_runs_forward_once_per_sample_and_view(story: Story) -> None:
    summary = story.summaries[-1]
    nodes = NodeStore(open_storage(str(story.run_dir / "store")))
    for name in ("segprop", "lw"):
        forwards: Counter[str] = Counter()
        for node in story.prepared.plan.nodes:
            commit = nodes.commit_of(node.id)
            assert commit is not None
            if name in node.regimes and node.kind in ("train", "materialize"):
                forwards.update(commit.result["forwards"])
        # Two views of 96 training samples, and 48 to validate on.
        blocks = ("seg1", "seg2", "seg3", "seg4")[: 4 if name == "lw" else 3]
        assert forwards == dict.fromkeys(blocks, 2 * 96 + 48)
        assert {block: facts["per_sample_view"] for block, facts in summary["regimes"][name]["forwards"].items()} == (
            dict.fromkeys(blocks, 1.0)
        )
    # Recomputing runs them in every epoch of every later stage.
    never = {block: facts["samples"] for block, facts in summary["regimes"]["never"]["forwards"].items()}
    once = 2 * (96 + 48)
    assert never == {"seg1": 3 * once, "seg2": 2 * once, "seg3": once}


def test_sets_are_released_after_their_last_reader(story: Story) -> None:
    sets = SnapshotStore(open_storage(str(story.run_dir / "store"))).list()
    assert [item for item in sets if item.key.get("kind") == "boundary"] == []


def test_every_regime_learns_and_says_so(story: Story) -> None:
    for name, regime in story.summaries[-1]["regimes"].items():
        assert regime["final"]["rows"] == 64
        losses = [epoch["train_loss"] for epoch in regime["stages"][0]["curve"]]
        assert losses[-1] < losses[0], name
        assert regime["final"]["metrics"]["accuracy"] > 0.1, name
    assert (story.run_dir / "report.html").stat().st_size > 10_000
    assert list((story.run_dir / "tb").rglob("events*"))


LOAD = """
import json, runpy, sys
import numpy as np, torch
torch.set_num_threads(1)
model = runpy.run_path(sys.argv[1] + "/load_model.py")["load"]()
images = torch.from_numpy(np.load(sys.argv[2]))
with torch.inference_mode():
    logits = model(images)
np.save(sys.argv[3], logits.numpy())
print(json.dumps({"ours": [name for name in ("workers", "cache_store", "orchestrator") if name in sys.modules]}))
"""


@pytest.mark.parametrize("regime", ["segprop", "e2e", "lw"])
def test_an_exported_model_loads_with_torchvision_alone_and_gives_the_same_logits(
    story: Story, tmp_path: Path, regime: str
) -> None:
    plan = story.prepared.plan
    node = plan.node(plan.regimes[regime].test)
    task = as_json.from_json(EvaluateTask, node.task)
    storage = open_storage(str(story.run_dir / "store"))
    nodes = NodeStore(storage)
    parents: dict[str, Any] = {role: nodes.commit_of(parent) for role, parent in node.parents.items()}
    images = ImageSource(task.experiment, parents["data"].read(ImageDataResult), SnapshotStore(storage), "test")
    weights = Weights(nodes, parents, domain_of(task.experiment), torch.device("cpu"))
    chain = ChainPath({name: weights.build(name) for name in task.path}, trained=())
    batch = images.batch(np.arange(images.rows), None)
    torch.set_num_threads(1)
    with torch.inference_mode():
        expected = chain((batch,))

    np.save(tmp_path / "images.npy", batch.numpy())
    # Isolated: neither the working directory nor PYTHONPATH can lend it our packages.
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            LOAD,
            str(story.run_dir / "model" / regime),
            str(tmp_path / "images.npy"),
            str(tmp_path / "logits.npy"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"ours": []}
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert torch.equal(logits, expected)
    accuracy = (logits.argmax(1) == images.labels).double().mean().item()
    assert accuracy == story.summaries[-1]["regimes"][regime]["final"]["metrics"]["accuracy"]


# -- other shapes of runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        (
            {
                "regimes": {
                    "pairs": {"kind": "segprop", "split": {"segment_size": 2, "train_base": False}},
                    "global": {"kind": "segprop", "split": {"head": 1}, "training": {"head_optimizer": "carry"}},
                    "frozen": {"kind": "segprop", "split": {"base": 2, "intermediate": "frozen"}},
                }
            },
            {
                "pairs": [["head"], ["seg2", "seg3", "head"], ["seg4", "head"]],
                "global": [["seg1", "seg4", "head"], ["seg2", "seg4", "head"], ["seg3", "seg4", "head"]],
                "frozen": [["seg1", "seg2", "head"], ["seg3", "head"], ["seg4", "head"]],
            },
        ),
        (
            {
                "regimes": ["segprop"],
                "model.segments": "blocks",
                "split": {"base": 5, "head": 1},
                "model.classifier": "linear",
            },
            {
                "segprop": [
                    ["seg1", "seg2", "seg3", "seg4", "seg5", "seg8", "head"],
                    ["seg6", "seg8", "head"],
                    ["seg7", "seg8", "head"],
                ]
            },
        ),
        (
            {"regimes": ["segprop"], "model.name": "resnet50", "model.head_convs": 3, "data.train_limit": 32},
            {"segprop": [["seg1", "head"], ["seg2", "head"], ["seg3", "head"], ["seg4", "head"]]},
        ),
    ],
    ids=[
        "untrained base, pairs, global head, frozen blocks",
        "a segment a residual block",
        "resnet50 with three convs",
    ],
)
def test_other_splits_and_models_run_end_to_end(
    tmp_path: Path, changes: dict[str, Any], stages: dict[str, Any]
) -> None:
    config = write_config(
        tmp_path, {"training.epochs": 1, "data.train_limit": 48, "evaluation.stages": False, **changes}
    )
    assert run(config) == 0
    summary = summary_of(tmp_path / "run")
    for name, expected in stages.items():
        regime = summary["regimes"][name]
        assert [stage["trained"] for stage in regime["stages"]] == expected
        assert regime["final"]["metrics"]["accuracy"] is not None
        assert (tmp_path / "run" / regime["export"] / "model.safetensors").exists()


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_diverging_regime_fails_by_name_and_the_others_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path,
        {
            "regimes": {"e2e": {"training": {"optimizer": {"lr": 1e6, "weight_decay": 1e30}}}, "segprop": {}},
            "training.epochs": 1,
        },
    )
    assert run(config) == 1
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "failed"
    assert summary["regimes"]["segprop"]["status"] == "done"
    assert summary["regimes"]["e2e"]["status"] == "failed"
    (failure,) = summary["failures"]
    assert "the loss is not finite at step 1 " in failure["message"]
    assert not (tmp_path / "run" / "model" / "e2e").exists()


BAD = """
model: {name: resnet18, stem: small, classifier: mpl}
data: {name: digits, image_size: 8, veiws: 2}
training: {epochs: 0, batch_size: 64, accumulate: 3}
regimes: [segprop]
split: {base: three}
resources: {runner: local}
run_dir: RUN_DIR
"""


def test_all_problems_of_a_file_are_reported_at_once_and_nothing_is_created(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(BAD.replace("RUN_DIR", str(tmp_path / "run")))
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.run", str(config)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "5 problems" in done.stderr
    for key, hint in {
        "model.classifier": "mlp",
        "data.veiws": "views",
        "training.epochs": "0",
        "training.accumulate": "must divide",
        "split.base": "three",
    }.items():
        lines = [line for line in done.stderr.splitlines() if key in line]
        assert lines, f"{key} is not reported:\n{done.stderr}"
        assert any(hint in line for line in lines), lines
    assert os.listdir(tmp_path) == ["bad.yaml"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_the_run_and_a_rerun_completes_once_there_is_space(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"run_dir": str(small_disk / "run"), "regimes": ["e2e"], "training.epochs": 1})
    filler = small_disk / "filler"
    # Room for the decoded images and the initial weights, not for the trained ones.
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 325 << 20)
    assert run(config) == 1
    summary = summary_of(small_disk / "run")
    assert "no space left" in summary["failures"][0]["message"].lower()
    assert summary["nodes"]["done"] == 2
    filler.unlink()
    assert run(config) == 0
    assert summary_of(small_disk / "run")["nodes"]["reused"] == 2


def test_a_run_directory_that_cannot_be_written_is_bad_input(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, {"run_dir": str(small_disk / "run")})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert run(config) == 2
    assert "store: cannot create" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert os.listdir(small_disk) == []


def test_weights_of_regimes_differ_where_they_should(story: Story) -> None:
    final = final_digests(story.prepared)
    assert final["segprop"]["seg1"] == final["never"]["seg1"], "the first stage reads images in both"
    assert len({final[name]["head"] for name in ("segprop", "e2e", "lw")}) == 3
