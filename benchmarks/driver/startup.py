"""How long until something happens: plans, imports, the first training step, and a run that is finished already.

Every figure is the wall time of a fresh process. `--dry-run` is measured for every configuration in configs/.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

LIMIT_DRY_RUN_S, LIMIT_AGAIN_S = 6.0, 30.0
HEAVY = ("torch", "ray")
#: A word in a model's id on the hub, and the folder in tests/data that has its config.json.
KEPT = {"Llama": "llama-3.1-8b", "Nemo": "mistral-nemo-12b", "SmolLM2": "smollm2-135m"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_image_arguments(parser)
    parser.add_argument("--repeats", type=int, help="(5; quick 1)")


def run(options: argparse.Namespace) -> Report:
    repeats = options.repeats or (1 if options.quick else 5)
    configs = sorted((harness.ROOT / "configs").glob("*.yaml"))
    with harness.workspace() as folder:
        overrides = {config.name: _overrides(config, options, folder) for config in configs}
        dry = harness.interleave(
            {config.name: functools.partial(_dry_run, config, overrides[config.name]) for config in configs}, repeats
        )
        imports = [_import("orchestrator.plan.builder") for _ in range(repeats)]
        jobs = [_job(folder / f"job{index}") for index in range(max(1, repeats // 2))]
    dry_stats = {name: harness.summary(run["seconds"] for run in runs) for name, runs in dry.items()}
    dry_loaded = {name: runs[0]["loaded"] for name, runs in dry.items()}
    import_stats = harness.summary(found["seconds"] for found in imports)
    job_stats = {key: harness.summary(job[key] for job in jobs) for key in jobs[0]}
    slowest = max(dry_stats, key=lambda name: dry_stats[name]["median"])
    return Report(
        title="how long until something happens",
        settings={"threads": harness.cores(), "repeats": repeats},
        results={
            "dry_run": dry_stats,
            "dry_run_loaded": dry_loaded,
            "import_plan": import_stats,
            "import_plan_loaded": imports[0]["loaded"],
            "job": job_stats,
        },
        tables=[
            Table(
                "--dry-run, seconds",
                ("configuration", "wall time", "loads torch", "loads Ray"),
                [
                    (name, harness.spread(stats), "torch" in dry_loaded[name], "ray" in dry_loaded[name])
                    for name, stats in dry_stats.items()
                ],
            ),
            Table(
                "A small run on Ray (digits, one epoch, one regime), seconds",
                ("", "wall time"),
                [
                    ("process start to first step", harness.spread(job_stats["to_first_step"])),
                    ("whole process", harness.spread(job_stats["process"])),
                    ("the same command again, everything reused", harness.spread(job_stats["again"])),
                ],
            ),
        ],
        targets=[
            (
                f"every --dry-run <= {LIMIT_DRY_RUN_S:g} s, without Ray",
                f"slowest {slowest}: {harness.spread(dry_stats[slowest])} s",
                dry_stats[slowest]["median"] <= LIMIT_DRY_RUN_S
                and not any("ray" in loaded for loaded in dry_loaded.values()),
            ),
            (
                "import orchestrator.plan.builder loads neither torch nor Ray",
                f"{harness.spread(import_stats)} s; loads {', '.join(imports[0]['loaded']) or 'neither'}",
                not imports[0]["loaded"],
            ),
            (
                f"a finished run again <= {LIMIT_AGAIN_S:g} s",
                f"{harness.spread(job_stats['again'])} s",
                job_stats["again"]["median"] <= LIMIT_AGAIN_S,
            ),
        ],
    )


def _overrides(config: Path, options: argparse.Namespace, folder: Path) -> list[str]:
    """The configuration as it is, but with images where they are on this machine, and of models on the hub the
    config.json that the tests keep."""
    import yaml

    document = yaml.safe_load(config.read_text())
    if document["model"].get("family") == "causal_lm":
        kept = next((folder for word, folder in KEPT.items() if word in document["model"].get("path", "")), None)
        shape = [] if kept is None else [f"model.path={harness.ROOT / 'tests' / 'data' / kept}", "model.revision=null"]
        return [*shape, "data.name=stdlib", "data.path=null"]
    data = document["data"]
    if data["name"] == "digits":
        return []
    found = harness.image_data(options, folder)
    changes = [f"data.name={found['name']}", f"data.path={json.dumps(found['path'])}"]
    if found["name"] == "folder":
        # Made-up images are fewer than some configurations ask for.
        changes += ["data.download=false", "data.train_limit=null", "data.validation=0.1"]
    return changes


def _dry_run(config: Path, overrides: list[str]) -> Json:
    arguments = ["sweep" if config.stem.endswith("_sweep") else "run", str(config), *overrides, "--dry-run"]
    return _timed(f"import orchestrator.cli as c\ncode = c.main({arguments!r})\nassert code == 0, code")


def _import(module: str) -> Json:
    return _timed(f"import {module}")


def _timed(code: str) -> Json:
    """Wall time of a fresh interpreter that runs this, and which heavy packages it loaded."""
    ending = f"import json, sys\nprint('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    started = time.monotonic()
    done = harness.python("-c", f"{code}\n{ending}")
    return {"seconds": time.monotonic() - started, "loaded": json.loads(done.stdout.strip().splitlines()[-1])}


def _job(folder: Path) -> Json:
    config: Json = {
        "run": "startup",
        "model": {"name": "resnet18", "stem": "small"},
        "data": {"name": "digits", "image_size": 16, "augment": "light", "flip": False, "train_limit": 256},
        "training": {"epochs": 1, "batch_size": 64, "precision": "bf16", "channels_last": True},
        "regimes": ["e2e"],
        "resources": harness.single_slot(),
        "evaluation": {"stages": False},
    }
    started = time.time()
    found = harness.orchestrate(config, folder)
    again = time.monotonic()
    harness.python("-m", "orchestrator.run", str(folder / "config.yaml"), "--quiet")
    return {
        "to_first_step": found.window()[0] - started,
        "process": found.seconds,
        "again": time.monotonic() - again,
    }
