"""What the benchmarks share: the machine in words, interleaved runs, statistics, result files.

Standard library only: `memory` runs where neither Ray nor pydantic is installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "ray", "numpy", "pyarrow", "pydantic")
Json = dict[str, Any]


# --- what is reported -------------------------------------------------------------------------------------


@dataclass
class Table:
    """Rows for people; the same figures, unrounded, belong into `Report.results`."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass
class Report:
    """What one benchmark found. `targets`: (what is promised, what was measured, whether it holds)."""

    title: str
    settings: Json
    results: Json
    tables: list[Table]
    targets: list[tuple[str, str, bool | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write(report: Report, name: str, context: Json, out: Path) -> list[Path]:
    """`<out>/<name>.json` and `.md`; the paths written."""
    out.mkdir(parents=True, exist_ok=True)
    targets = [{"target": t, "measured": m, "holds": holds} for t, m, holds in report.targets]
    whole = {
        "benchmark": name,
        "title": report.title,
        **context,
        "settings": report.settings,
        "targets": targets,
        "results": report.results,
        "notes": report.notes,
    }
    paths = [out / f"{name}.json", out / f"{name}.md"]
    paths[0].write_text(json.dumps(whole, indent=1, sort_keys=False) + "\n")
    paths[1].write_text(markdown(report, name, context))
    return paths


def markdown(report: Report, name: str, context: Json) -> str:
    machine = context["machine"]
    lines = [f"# {name}: {report.title}", "", f"    {context['command']}", ""]
    versions = ", ".join(f"{package} {version}" for package, version in context["versions"].items())
    lines += [
        f"{context['date']}, commit {context['commit']}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; {machine['device']}; {machine['system']}. {versions}.",
        "",
    ]
    if machine["contended"]:
        lines += [
            f"**Contended**: the load average was {machine['load']:.1f} before the first run. Not for quoting.",
            "",
        ]
    if report.targets:
        rows = [(t, m, {True: "yes", False: "**no**", None: "not measured"}[holds]) for t, m, holds in report.targets]
        lines += _table(Table("", ("target", "measured", "holds"), rows))
    for table in report.tables:
        lines += [f"## {table.title}", "", *_table(table)]
    lines += [f"- {note}" for note in report.notes]
    if report.notes:
        lines.append("")
    lines += ["Settings: " + ", ".join(f"{key} {text(value)}" for key, value in report.settings.items()) + ".", ""]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    def row(cells: Iterable[object]) -> str:
        return "| " + " | ".join(text(cell) for cell in cells) + " |"

    return [row(table.header), row("---" for _ in table.header), *(row(cells) for cells in table.rows), ""]


def text(value: object) -> str:
    """Three significant digits at least, no more decimals than that; missing values as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        return f"{value:,.{digits}f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def spread(stats: Mapping[str, Any]) -> str:
    """`median (min to max, n)` of what `summary` gave."""
    if stats["n"] == 1:
        return f"{text(stats['median'])} (n=1)"
    return f"{text(stats['median'])} ({text(stats['min'])} to {text(stats['max'])}, n={stats['n']})"


# --- what was measured on --------------------------------------------------------------------------------


def context(arguments: Sequence[str]) -> Json:
    """Command, date, commit, machine and versions: the head of every result. No path of this machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return {
        "command": "python -m benchmarks " + " ".join(_scrubbed(argument) for argument in arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": {
            "cpu": _cpu(),
            "cores": cores(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "device": device_name(),
            "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "load": round(load, 2),
            "contended": load > 0.5,
        },
        "versions": versions(),
    }


def _scrubbed(argument: str) -> str:
    """An argument without the folders of this machine."""
    return re.sub(r"(^|=)(/|~)[^\s=]*/([^/\s]+)/?$", r"\1…/\3", argument)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str:
    """The short hash, with `+changes` when a tracked file differs from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def device_name() -> str:
    """Asked of the driver, so that no benchmark has to load torch for it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "no GPU"
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return ", ".join(names) if done.returncode == 0 and names else "no GPU"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- measuring ------------------------------------------------------------------------------------------


def interleave(cases: Mapping[str, Callable[[], Json]], repeats: int) -> dict[str, list[Json]]:
    """Every case once a round, in an order that is turned round each time, so that drift hits all alike."""
    runs: dict[str, list[Json]] = {name: [] for name in cases}
    for index in range(repeats):
        order = list(cases) if index % 2 == 0 else list(cases)[::-1]
        for name in order:
            say(f"{name} ({index + 1}/{repeats})")
            runs[name].append(cases[name]())
    return runs


def summary(values: Iterable[float]) -> Json:
    """median, min, max, n and the values themselves."""
    known = list(values)
    return {
        "median": statistics.median(known),
        "min": min(known),
        "max": max(known),
        "n": len(known),
        "values": known,
    }


def say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def python(*arguments: str, timeout_s: float = 3600, check: bool = True) -> subprocess.CompletedProcess[str]:
    """This interpreter in a process of its own, from the root of the repository. Its standard error is shown
    when it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if check and done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def child(*arguments: str, timeout_s: float = 3600) -> Json:
    """As `python`, for programs whose last line of output is a JSON object."""
    done = python(*arguments, timeout_s=timeout_s)
    result: Json = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="segprop-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- orchestrated runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run as its files tell it."""

    summary: Json
    #: Node -> commit, with `committed`: when its record appeared in the store (unix seconds).
    commits: dict[str, Json]
    seconds: float

    def nodes(self, *kinds: str) -> list[Json]:
        """Work of these kinds in the order in which it began: label, node, kind, and the commit's result."""
        found = [
            {**work, **self.commits[work["node"]]}
            for work in self.summary["work"]
            if work["kind"] in kinds and work["node"] in self.commits
        ]
        return sorted(found, key=lambda node: node["result"].get("where", {}).get("started", 0.0))

    def window(self) -> tuple[float, float]:
        """From the first step of the first stage to the last commit."""
        return first_step(self.nodes("train")[0]["result"]), max(c["committed"] for c in self.commits.values())


def first_step(result: Json) -> float:
    """When a stage's first step began; older commits lack it, then the end less what was timed."""
    where = result["where"]
    return float(where.get("first_step") or where["finished"] - result["seconds"])


def orchestrate(config: Json, folder: Path, *, template: Path | None = None) -> Run:
    """`python -m orchestrator.run` on this configuration, in `folder`, as a process of its own.

    `template`: a store whose decoded data are linked into the run's, so that decoding is done once a benchmark.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    source, run_dir = folder / "config.yaml", folder / "run"
    source.write_text(yaml.safe_dump({**config, "run_dir": str(run_dir)}, sort_keys=False))
    store = run_dir / "store"
    if template is not None and template.is_dir():
        shutil.copytree(template, store, copy_function=os.link)
    started = time.monotonic()
    python("-m", "orchestrator.run", str(source), "--quiet")
    seconds = time.monotonic() - started
    found = json.loads((run_dir / "summary.json").read_text())
    commits = {}
    for work in found["work"]:
        record = store / "nodes" / work["node"] / "commit.json"
        if record.is_file():
            commits[work["node"]] = {**json.loads(record.read_text()), "committed": record.stat().st_mtime}
    if template is not None and not template.is_dir():
        _keep_data(found, commits, store, template)
    return Run(found, commits, seconds)


def _keep_data(found: Json, commits: Mapping[str, Json], store: Path, template: Path) -> None:
    for work in found["work"]:
        if work["kind"] == "data":
            kept = [f"nodes/{work['node']}"]
            kept += [f"sets/{commits[work['node']]['result'][name]}" for name in ("train", "test")]
            for name in kept:
                shutil.copytree(store / name, template / name, copy_function=os.link)


def single_slot() -> Json:
    """One worker with all cores: what a plain loop has too."""
    return {"runner": "ray", "device": "cpu", "slots": 1, "threads": cores()}


# --- images ---------------------------------------------------------------------------------------------


def image_data(options: argparse.Namespace, folder: Path) -> Json:
    """The `data` section's name and path: CIFAR-10 where it is, else made-up images of its shape."""
    if getattr(options, "digits", False):
        return {"name": "digits", "flip": False}
    path = Path(options.cifar)
    path = path if path.is_absolute() else ROOT / path
    if path.exists():
        return {"name": "cifar10", "path": str(path)}
    made = folder / "images"
    if not made.exists():
        say(f"no CIFAR-10 at {_scrubbed(options.cifar)}: making images of its shape")
        _make_images(made, per_class={"train": 500, "test": 50})
    return {"name": "folder", "path": str(made)}


def _make_images(folder: Path, per_class: Mapping[str, int]) -> None:
    """Ten classes of 32x32 noise around a colour of the class: something to learn, nothing to download."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in per_class.items():
        for label in range(10):
            target = folder / split / f"class{label}"
            target.mkdir(parents=True)
            base = random.integers(64, 192, size=3)
            for index in range(count):
                pixels = np.clip(base + random.normal(0, 60, size=(32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{index:05d}.png")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cifar", default="../shared/data/cifar10", help="CIFAR-10 as Parquet or torchvision's folder (%(default)s)"
    )
