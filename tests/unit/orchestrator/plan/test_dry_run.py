"""The plan as people see it, and the program around it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from planning import CIFAR, SMALL, merged

from cache_store.errors import StorageFull
from orchestrator import cli
from orchestrator.runs.dry_run import print_plan, regime_rows, total
from orchestrator.runs.prepare import Prepared, prepare
from orchestrator.units import human_count, human_flops, human_seconds

ROOT = Path(__file__).parents[4]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, {"run_dir": str(tmp_path / "run")}), sort_keys=False))
    return path


def prepared(path: Path, *overrides: str) -> Prepared:
    return prepare(path, overrides, inspect=lambda data, seed: CIFAR)


def shown(path: Path, *overrides: str) -> str:
    stream = io.StringIO()
    print_plan(prepared(path, *overrides), stream)
    return stream.getvalue()


def test_every_stage_and_boundary_has_a_line(small: Path) -> None:
    text = shown(small)
    for line in (
        "e2e",
        "stage1-seg1",
        "head",
        "stage1-base",
        "stage4-seg4",
        "snapshots after seg3",
        "evaluations",
    ):
        assert f"\n{line} " in text
    assert "images: starts at the images" in text
    assert "2 views + validation, float32, rolled forward by seg2" in text
    assert "saves 93" in text or "of the prefix's forward work" in text
    assert "Nothing was run." in text
    assert all(len(line) <= 170 for line in text.splitlines())


def test_the_reason_for_recomputing_is_shown(small: Path) -> None:
    assert "recompute: snapshots.mode is never" in shown(small, "snapshots.mode=never")
    assert "exceed this regime's budget of 500.0 kB" in shown(small, "snapshots.budget=1MB")


def test_lines_cover_every_node_of_a_regime_once(small: Path) -> None:
    found = prepared(small, "regimes.lw.stages.stage2-seg3-seg4.epochs=1", "split.segment_size=2")
    plan = found.plan
    for regime in plan.regimes.values():
        lines = [node.id for row in regime_rows(plan, regime, found.config.domain) for node in row.nodes]
        assert len(lines) == len(set(lines))
        mine = {node.id for node in plan.nodes if regime.name in node.regimes and node.kind not in ("data", "model")}
        assert set(lines) == mine


def test_totals_add_work_and_take_the_largest_memory(small: Path) -> None:
    plan = prepared(small).plan
    whole = total(node.estimate for node in plan.nodes)
    assert whole.flops == sum(node.estimate.flops for node in plan.nodes)
    assert whole.peak_bytes == max(node.estimate.peak_bytes for node in plan.nodes)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.21, "0.2 s"), (45, "45 s"), (61.2, "1 min 01 s"), (3723, "1 h 02 min"), (100_000, "1 d 3 h")],
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_counts_read_naturally() -> None:
    assert [human_count(count) for count in (0, 12, 11_400, 11_400_000)] == ["", "12", "11.40 k", "11.40 M"]
    assert [human_flops(count) for count in (0, 1500, 2e12)] == ["", "1.5 k", "2.0 T"]


# -- the program --------------------------------------------------------------------------------------------


def program(*arguments: str, module: str = "orchestrator.cli", check: str = "") -> subprocess.CompletedProcess[str]:
    """The program in its own process; `check` runs after it in the same interpreter."""
    script = f"import sys; sys.argv = ['segprop', *{list(arguments)!r}]\n"
    script += f"from orchestrator.cli import main\ncode = main()\n{check}\nsys.exit(code)"
    command = [sys.executable, "-c", script] if check else [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_a_dry_run_imports_neither_ray_nor_torch() -> None:
    # That is what makes it quick; how quick is measured by `benchmarks/driver/startup.py`.
    check = "heavy = {'ray', 'torch', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    done = program("run", "configs/quickstart.yaml", "--dry-run", check=check)
    assert done.returncode == 0, done.stderr
    assert "stage4-seg4" in done.stdout
    assert not (ROOT / "runs" / "never-made").exists()


def test_the_run_module_is_the_run_command(small: Path, tmp_path: Path) -> None:
    done = program(str(small), "training.epochs=3", "--dry-run", module="orchestrator.run")
    assert done.returncode == 0, done.stderr
    assert "stage4-seg4" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_plan_is_available_as_json(small: Path) -> None:
    done = program("plan", str(small), "--json", "seed=5")
    content = json.loads(done.stdout)
    assert content["config"]["seed"] == 5
    assert {node["kind"] for node in content["plan"]["nodes"]} == {
        "data",
        "model",
        "train",
        "materialize",
        "evaluate",
    }


def test_bad_input_exits_with_2_and_a_plain_message(small: Path, tmp_path: Path) -> None:
    done = program("run", str(small), "training.epoch=3", "seed=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"segprop: {small}: 2 problems",
        "  override seed=x: seed: x: must be a valid integer",
        "  override training.epoch=3: training.epoch: unknown key; did you mean epochs?",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["run"],
        ["run", "x.yaml", "--nonsense"],
        ["report", "absent"],
        ["cache", "ls", "absent"],
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("run", "plan", "report", "export", "cache"):
        assert f"\n  {command} " in text


def test_exit_codes_of_a_run_come_from_its_session(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def execute(prepared: Prepared, *, quiet: bool = False, take_over: bool = False) -> int:
        calls.append((prepared.config.run, quiet))
        if prepared.config.seed == 9:
            raise StorageFull("no space left on /store")
        return prepared.config.seed

    monkeypatch.setattr("orchestrator.runs.session.execute", execute)
    assert cli.main(["run", str(small)]) == 0
    assert cli.main(["run", str(small), "-q", "seed=1", f"run_dir={tmp_path / 'b'}"]) == 1
    assert cli.main(["run", str(small), "seed=9", f"run_dir={tmp_path / 'c'}"]) == 1
    assert calls == [("small", False), ("small", True), ("small", False)]
    # The session claims the run directory, under the run's lease.
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == "segprop: no space left on /store\n"


def test_a_plan_of_data_that_are_to_be_downloaded_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision import datasets

    from orchestrator.cli import main

    def fetch(*arguments: object, **options: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr(datasets, "CIFAR10", fetch)
    path = tmp_path / "cifar.yaml"
    place = tmp_path / "data"
    path.write_text(
        f"data: {{name: cifar10, path: {place}, download: true, image_size: 32}}\n"
        f"regimes: [e2e]\nrun_dir: {tmp_path}/run\nmodel: {{name: resnet18}}\n"
    )
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    assert "45000 + 5000 + 10000 images" in said
    assert "not here yet: the run downloads them" in said
    assert not place.exists()
