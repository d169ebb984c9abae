"""List the runs in a folder: state, what they take on the disk, how good they are. Plans nothing and loads no data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from cache_store.errors import CorruptRecord, SegpropError
from cache_store.records.record_io import read_local
from orchestrator.config.yaml_loader import load_document
from orchestrator.reports.record_json import from_json
from orchestrator.reports.records import Summary
from orchestrator.reports.tables.result_table import print_rows
from orchestrator.reports.words import STATE_WORDS
from orchestrator.status.observe import observe_recorded
from orchestrator.units import DASH, bytes_text, score_text, seconds_text

CONFIG_FILE = "config.yaml"
#: Folders of a run that hold no other run.
_OWN = ("store", "model", "tb", "earlier")
#: Of a sweep, the folder that holds its trials.
TRIALS = "trials"
#: Folders looked into below the one that was named.
_DEPTH = 4


@dataclass(frozen=True)
class ListedRun:
    """One run. `state` as `RunStatus.state`, or `sweep`, or `unknown` with the `reason`; `bytes` of its folder, those
    of its own store and its models among them; `scores`: regime -> its metrics on the test split."""

    path: str
    state: str
    reason: str | None
    bytes: int
    store_bytes: int
    model_bytes: int
    last_activity_s: float | None
    scores: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "scores": {name: dict(metrics) for name, metrics in self.scores.items()}}


def run_dirs(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Yield the run directories in a folder (itself, where it is one), by name; trials of sweeps among them."""
    if (folder / CONFIG_FILE).is_file():
        yield folder
    if depth == 0:
        return
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in inside:
        if name not in _OWN and not name.startswith("."):
            yield from run_dirs(folder / name, depth - 1)


def is_listed(place: Path) -> bool:
    """Tell whether a place is a folder that holds runs, and no run itself."""
    return place.is_dir() and not (place / CONFIG_FILE).is_file() and any(run_dirs(place))


def list_runs(folder: Path) -> list[ListedRun]:
    """Look at every run in a folder once."""
    return [_look(path) for path in run_dirs(folder)]


def _look(run_dir: Path) -> ListedRun:
    state, reason, age = _state(run_dir)
    return ListedRun(
        path=str(run_dir),
        state=state,
        reason=reason,
        bytes=folder_bytes(run_dir),
        store_bytes=folder_bytes(run_dir / "store"),
        model_bytes=folder_bytes(run_dir / "model"),
        last_activity_s=age,
        scores=_scores(run_dir),
    )


def _state(run_dir: Path) -> tuple[str, str | None, float | None]:
    """Return the state, why it is not known, and the seconds since something happened."""
    try:
        if "sweep" in load_document(run_dir / CONFIG_FILE).data:
            return "sweep", None, None
        observer = observe_recorded(run_dir)
        if observer is None:
            trial = _trial_state(run_dir)
            return (trial, None, None) if trial else ("unknown", "it left no record in its store", None)
        found = observer.look()
        return found.state, found.away, found.last_activity_s
    except SegpropError as error:
        return "unknown", error.message, None


def _trial_state(run_dir: Path) -> str | None:
    """Return how far a trial of a sweep is, as the sweep last said: its driver is the sweep's. None for another run."""
    sweep = run_dir.parent.parent
    if run_dir.parent.name != TRIALS or "sweep" not in load_document(sweep / CONFIG_FILE).data:
        return None
    trials = (read_local(sweep / "sweep.json") or {}).get("trials")
    told = trials if isinstance(trials, list) else []
    mine = (trial for trial in told if isinstance(trial, Mapping) and trial.get("folder") == run_dir.name)
    return str(next(mine, {}).get("status") or "waiting")


def _scores(run_dir: Path) -> dict[str, dict[str, float]]:
    """Return the final metrics by regime, from the summary; {} without one that can be read."""
    try:
        summary = from_json(Summary, read_local(run_dir / "summary.json") or {})
    except CorruptRecord:
        return {}
    finals = {name: regime.final.metrics for name, regime in summary.regimes.items()}
    return {
        name: {key: float(value) for key, value in metrics.items() if value is not None}
        for name, metrics in finals.items()
        if metrics
    }


def folder_bytes(folder: Path) -> int:
    """Add up the lengths of the files in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def show_runs(runs: Sequence[ListedRun], folder: Path, stream: TextIO | None = None) -> None:
    """Print a line a run, and what all of them take."""
    stream = stream or sys.stdout
    rows = [("run", "state", "size", "store", "models", "last activity", "test")]
    for run in runs:
        scores = ", ".join(f"{name} {score_text(metrics)}" for name, metrics in run.scores.items())
        age = DASH if run.last_activity_s is None else f"{seconds_text(round(run.last_activity_s))} ago"
        sizes = (bytes_text(run.bytes), bytes_text(run.store_bytes), bytes_text(run.model_bytes))
        rows.append(
            (os.path.relpath(run.path, folder), STATE_WORDS.get(run.state, run.state), *sizes, age, scores or DASH)
        )
    print_rows(Console(file=stream, highlight=False), rows)
    for run in runs:
        if run.reason is not None:
            stream.write(f"{run.path}: {run.reason}\n")
    # A sweep's folder holds those of its trials.
    sweeps = tuple(f"{run.path}/" for run in runs if run.state == "sweep")
    total = sum(run.bytes for run in runs if not run.path.startswith(sweeps))
    stream.write(f"{len(runs)} runs, {bytes_text(total)}\n")
