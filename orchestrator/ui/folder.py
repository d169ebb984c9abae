"""Find what lies in the folder that the page shows, and nothing outside it: runs, result files, configurations."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from cache_store.errors import CorruptRecord, UserError
from cache_store.records.record_io import read_local
from cache_store.storage.durable import read_regular
from orchestrator.execution.run_record import POINTER
from orchestrator.reports.record_json import from_json
from orchestrator.reports.records import Summary
from orchestrator.status.listing import CONFIG_FILE, TRIALS, folder_bytes, run_dirs
from orchestrator.ui.records import ListedView, RunView
from orchestrator.ui.run_view import LOOKING, RESULTS, WatchedRun
from orchestrator.ui.sweep_view import settings_of
from orchestrator.units import score_text

Found = TypeVar("Found")

#: Seconds between two additions of a run's bytes, looks at a run that has ended and whose files are as they were, and
#: walks through the folder.
SIZES_S, ENDED_S, RUNS_S = 60.0, 30.0, 2.0
#: Configurations that are offered for a plan, and folders looked into for them.
MOST_CONFIGS, _DEPTH = 200, 4
#: Runs that are kept in mind.
MOST_RUNS = 2000
#: Bytes of a result file that are sent.
MOST_BYTES = 64 << 20


@dataclass
class _Known:
    """A run that was looked at, and when (monotonic seconds)."""

    watched: WatchedRun
    view: RunView | None = None
    reason: str = ""
    looked: float = 0.0
    mark: tuple[float, ...] = ()
    sizes: tuple[int, int] = (0, 0)
    sweep: bool = False
    scores: Mapping[str, str] = field(default_factory=dict)
    measured: float = -SIZES_S
    lock: threading.Lock = field(default_factory=threading.Lock)


class Recent(Generic[Found]):
    """Something that takes long to find, found again after some seconds."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._found: tuple[float, Found] | None = None

    def get(self, find: Callable[[], Found]) -> Found:
        now = time.monotonic()
        if self._found is None or now - self._found[0] > self._keep_s:
            self._found = (now, find())
        return self._found[1]


class Folder:
    """The folder that was named when the page was started. Safe to use from many threads."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()
        self._found_runs: Recent[list[Path]] = Recent(RUNS_S)
        self._found_configs: Recent[list[str]] = Recent(ENDED_S)

    def run_dir(self, path: str) -> Path:
        """Return the run directory of this name. UserError when there is none, or it leads out of the folder."""
        found = self._inside(path)
        if not (found / CONFIG_FILE).is_file():
            raise UserError(f"{path}: no run here")
        for name in (*RESULTS, POINTER):
            if (found / name).is_symlink():
                self._inside(f"{path}/{name}")
        return found

    def config(self, path: str) -> Path:
        """Return the configuration file of this name. UserError as `run_dir`."""
        found = self._inside(path)
        if found.suffix not in (".yaml", ".yml") or not found.is_file():
            raise UserError(f"{path}: no configuration here; named are YAML files below the folder")
        return found

    def result(self, path: str) -> bytes:
        """Read a result file of a run, by its name. UserError when it is none of `RESULTS`, or not there."""
        name = PurePosixPath(path).name
        if name not in RESULTS:
            raise UserError(f"{path}: no result file; there may be {', '.join(RESULTS)}")
        source = self.run_dir(str(PurePosixPath(path).parent)) / name
        try:
            if source.is_symlink():
                raise FileNotFoundError
            data = read_regular(source, MOST_BYTES + 1)
        except OSError as error:
            raise UserError(f"{path}: not there") from error
        if len(data) > MOST_BYTES:
            raise UserError(f"{path}: longer than {MOST_BYTES >> 20} MiB; read it where it lies")
        return data

    def _inside(self, path: str) -> Path:
        """Return a place below the root. UserError for any name that leads elsewhere, also by symbolic links."""
        pure = PurePosixPath(path)
        if not path or "\0" in path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
            raise UserError(f"{path!r}: names are relative to the folder, without ..")
        try:
            found = (self.root / pure).resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
            raise UserError(f"{path}: not there") from error
        if not found.is_relative_to(self.root):
            raise UserError(f"{path}: leads out of the folder")
        return found

    def look(self, path: str) -> RunView:
        """Look at a run. UserError and StoreError as `WatchedRun.look`."""
        known = self._of(path)
        with known.lock:
            return known.watched.look()

    def watched(self, path: str) -> WatchedRun:
        """Return who watches a run, for who wants to know its driver. UserError as `run_dir`."""
        return self._of(path).watched

    def _of(self, path: str) -> _Known:
        run_dir = self.run_dir(path)
        with self._lock:
            known = self._known.get(path)
            if known is None or known.watched.run_dir != run_dir:
                if len(self._known) >= MOST_RUNS:
                    self._known.clear()
                sweep = run_dir.parent.parent if run_dir.parent.name == TRIALS else None
                if sweep is not None and not is_sweep_dir(sweep):
                    sweep = None
                known = self._known[path] = _Known(WatchedRun(run_dir, path, sweep))
            return known

    def runs(self) -> list[ListedView]:
        """Return every run in the folder. What cannot be looked at is listed with the reason."""
        return [listed for run_dir in self.run_dirs() if (listed := self._listed(run_dir)) is not None]

    def run_dirs(self) -> list[Path]:
        """Return the run directories, as they were at most some seconds ago."""
        return self._found_runs.get(lambda: list(run_dirs(self.root)))

    def _listed(self, run_dir: Path) -> ListedView | None:
        """Look at a run for the list; None where it is gone, or its files lead out of the folder."""
        path = os.path.relpath(run_dir, self.root)
        try:
            known = self._of(path)
        except UserError:
            return None
        with known.lock:
            self._refresh(known)
        view = known.view
        state = "unknown" if view is None else view.state
        return ListedView(
            path=path,
            state=state,
            state_words="not known" if view is None else view.state_words,
            reason=known.reason,
            done=0 if view is None else view.counts["done"],
            total=0 if view is None else view.counts["total"],
            bytes=known.sizes[0],
            store_bytes=known.sizes[1],
            seen=None if view is None else view.seen,
            scores=known.scores,
            sweep=known.sweep,
            trial=run_dir.parent.name == TRIALS,
        )

    def _refresh(self, known: _Known) -> None:
        """Look again where something may have changed."""
        now, run_dir = time.monotonic(), known.watched.run_dir
        mark = _mark(run_dir)
        ended = known.view is not None and known.view.state not in ("running", "waiting")
        if mark != known.mark:
            known.sweep, known.scores = is_sweep_dir(run_dir), _scores(run_dir)
        if not ended or mark != known.mark or now - known.looked > ENDED_S:
            try:
                known.view, known.reason = known.watched.look(), ""
            except LOOKING as error:
                known.view, known.reason = None, error.message
            known.looked, known.mark = now, mark
        if now - known.measured >= SIZES_S:
            known.sizes = (folder_bytes(run_dir), folder_bytes(run_dir / "store"))
            known.measured = now

    def configs(self) -> list[str]:
        """Return the YAML files in the folder whose plan may be asked for: those that stand in no run."""
        return self._found_configs.get(
            lambda: [os.path.relpath(path, self.root) for path in islice(_yaml_files(self.root, _DEPTH), MOST_CONFIGS)]
        )


def _yaml_files(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name == CONFIG_FILE for entry in entries):
        return
    for entry in entries:
        if entry.is_file() and entry.name.endswith((".yaml", ".yml")):
            yield Path(entry.path)
        elif depth and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _yaml_files(Path(entry.path), depth - 1)


def is_sweep_dir(run_dir: Path) -> bool:
    """Tell whether a directory holds a sweep: its configuration has one."""
    return settings_of(run_dir / CONFIG_FILE).get("sweep") is not None


def _mark(run_dir: Path) -> tuple[float, ...]:
    """Return something that changes when a driver begins or ends to work in a directory."""
    found = []
    for name in (CONFIG_FILE, POINTER, "log.jsonl", "summary.json", "sweep.json"):
        try:
            found.append((run_dir / name).stat().st_mtime)
        except OSError:
            found.append(0.0)
    return tuple(found)


def _scores(run_dir: Path) -> dict[str, str]:
    """Return what each regime's final model came to on the test split, from the summary; {} without one."""
    try:
        found = read_local(run_dir / "summary.json")
        summary = None if found is None else from_json(Summary, found)
    except CorruptRecord:
        return {}
    regimes = {} if summary is None else summary.regimes
    finals = {
        name: {key: float(value) for key, value in regime.final.metrics.items() if value is not None}
        for name, regime in regimes.items()
    }
    return {name: score_text(metrics) for name, metrics in finals.items() if score_text(metrics)}
