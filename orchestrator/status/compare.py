"""Put runs side by side: the settings in which they differ, and what each came to. `segprop compare`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from cache_store.errors import CorruptRecord, UserError
from cache_store.records.record_io import read_local
from orchestrator.config.yaml_loader import leaves, load_document
from orchestrator.reports.quality import Quality, quality_of
from orchestrator.reports.record_json import from_json, to_json
from orchestrator.reports.records import RegimeSummary, Summary
from orchestrator.reports.tables import benchmarks, seeds
from orchestrator.reports.tables.result_table import print_rows
from orchestrator.reports.words import MemoryBasis, baseline_of
from orchestrator.status.listing import CONFIG_FILE
from orchestrator.units import DASH, bytes_text, score_text, seconds_text

#: Characters of a value in a table.
_WIDTH = 40
#: Settings that say where a run lies, in which any two differ.
_PLACES = ("run", "run_dir", "store")


@dataclass(frozen=True)
class ComparedRun:
    """One run: its resolved settings by dotted key, and its summary, where there is one."""

    path: str
    settings: Mapping[str, Any]
    summary: Summary | None


@dataclass(frozen=True)
class Comparison:
    runs: tuple[ComparedRun, ...]

    def keys(self, *, same: bool = False) -> list[str]:
        """Return the settings in which the runs differ, in the order of the files; with `same` all.

        Of a regime that only some of them have, its kind stands for all the others."""
        found = dict.fromkeys(key for run in self.runs for key in run.settings if key not in _PLACES)
        kinds = [key for key in found if key.startswith("regimes.") and key.endswith(".kind")]
        partly = [key for key in kinds if any(key not in run.settings for run in self.runs)]
        inside = tuple(key.removesuffix("kind") for key in partly)
        return [key for key in found if same or (self.differs(key) and (key in partly or not key.startswith(inside)))]

    def differs(self, key: str) -> bool:
        """Tell whether a setting is not the same in all runs."""
        return len({json.dumps(run.settings.get(key, DASH), sort_keys=True) for run in self.runs}) > 1

    def regimes(self) -> list[str]:
        """Return the regimes that some run has results of."""
        return list(dict.fromkeys(name for run in self.runs if run.summary for name in run.summary.regimes))

    @property
    def quality(self) -> Quality | None:
        """What the runs are judged by; None where none has results, or they are not judged by the same."""
        found = {quality_of(run.summary) for run in self.runs if run.summary is not None}
        return found.pop() if len(found) == 1 else None

    def over_seeds(self) -> tuple[seeds.SeedRow, ...]:
        """Return the regimes' test scores summed up over seeds, by the other settings in which runs differ."""
        quality, others = self.quality, [key for key in self.keys() if key != "seed"]
        if quality is None:
            return ()
        scores = [
            seeds.Score(_settings(run, others), name, int(run.settings["seed"]), value)
            for run in self.runs
            for name, regime in (run.summary.regimes if run.summary else {}).items()
            if "seed" in run.settings and (value := quality.value(regime.final.metrics)) is not None
        ]
        baseline = next((baseline_of(run.summary) for run in self.runs if run.summary is not None), None)
        return seeds.over_seeds(scores, baseline)

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [run.path for run in self.runs],
            "settings": {key: [run.settings.get(key) for run in self.runs] for key in self.keys()},
            "results": {name: [_figures(run, name) for run in self.runs] for name in self.regimes()},
            "over_seeds": [dataclasses.asdict(row) for row in self.over_seeds()],
        }


def compare(run_dirs: Sequence[Path]) -> Comparison:
    """Read the runs. UserError when there are fewer than two, or a place is no run directory."""
    if len(run_dirs) < 2:
        raise UserError("compare: name two runs or more")
    return Comparison(tuple(_read(run_dir) for run_dir in run_dirs))


def _read(run_dir: Path) -> ComparedRun:
    source = run_dir / CONFIG_FILE
    if not source.is_file():
        raise UserError(f"{run_dir}: not a run directory, it has no {CONFIG_FILE}")
    settings = leaves(load_document(source).data)
    try:
        found = read_local(run_dir / "summary.json")
        summary = None if found is None else from_json(Summary, found)
    except CorruptRecord as error:
        raise UserError(
            f"{run_dir}: summary.json cannot be read: {error}; `segprop report {run_dir}` writes it"
        ) from error
    return ComparedRun(str(run_dir), settings, summary)


def _figures(run: ComparedRun, name: str) -> dict[str, Any] | None:
    regime = None if run.summary is None else run.summary.regimes.get(name)
    if run.summary is None or regime is None:
        return None
    return {
        "status": regime.status,
        "test": dict(regime.final.metrics),
        "validation": dict(regime.final.validation),
        "seconds": regime.seconds,
        "peak_bytes": MemoryBasis(run.summary).of(regime),
        "trainable_parameters": regime.trainable_parameters,
        **({"judged": to_json(regime)["stages"][-1]["judged"]} if regime.judged else {}),
    }


def show(found: Comparison, *, same: bool = False, stream: TextIO | None = None) -> None:
    """Print the settings that differ, then the results, a column a run; `same`: all settings, the others marked `*`."""
    console = Console(file=stream or sys.stdout, highlight=False)
    heads = run_names([run.path for run in found.runs])
    rows = setting_rows(found, same=same)
    settings = [(f"{'* ' if same and found.differs(row[0]) else ''}{row[0]}", *row[1:]) for row in rows]
    if settings:
        print_rows(console, [("setting", *heads), *settings])
    else:
        console.print("no setting differs")
    console.print()
    results = result_rows(found)
    if results:
        print_rows(console, [("result", *heads), *results])
    else:
        console.print("no run has results yet")
    over, quality = found.over_seeds(), found.quality
    if over and quality is not None:
        console.print(f"\ntest {quality.row.title} over seeds")
        print_rows(console, [seeds.HEADS, *seeds.cells(over, share=quality.row.share)])
        console.print(seeds.NOTE)


def setting_rows(found: Comparison, *, same: bool = False) -> list[tuple[str, ...]]:
    """Return the settings that differ (`same`: all) as texts: the key, then a cell a run."""
    return [(key, *(_text(run.settings.get(key, DASH)) for run in found.runs)) for key in found.keys(same=same)]


def result_rows(found: Comparison) -> list[tuple[str, ...]]:
    """Return what the runs came to as texts: the figure's name, then a cell a run."""
    rows = []
    for name in found.regimes():
        regimes = [(run, run.summary.regimes.get(name) if run.summary else None) for run in found.runs]
        for words, figure in _FIGURES.items():
            rows.append((f"{name} {words}", *(DASH if each is None else figure(run, each) for run, each in regimes)))
        for benchmark in benchmarks.asked(each.judged for _, each in regimes if each is not None):
            scores = [None if each is None else each.judged.get(benchmark) for _, each in regimes]
            rows.append((f"{name} {benchmarks.title(benchmark)}", *map(benchmarks.cell, scores)))
    return rows


def _settings(run: ComparedRun, keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {_text(run.settings.get(key, DASH))}" for key in keys)


def _test(run: ComparedRun, regime: RegimeSummary) -> str:
    known = {name: value for name, value in regime.final.metrics.items() if value is not None}
    return score_text(known) or regime.status


def _peak(run: ComparedRun, regime: RegimeSummary) -> str:
    return DASH if run.summary is None else bytes_text(MemoryBasis(run.summary).of(regime))


def _time(run: ComparedRun, regime: RegimeSummary) -> str:
    return seconds_text(regime.seconds or None)


_FIGURES = {"test": _test, "peak memory": _peak, "time": _time}


def run_names(paths: Sequence[str]) -> list[str]:
    """Return the paths without the folders that all of them are in."""
    absolute = [os.path.abspath(path) for path in paths]
    above = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, above) for path in absolute]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
