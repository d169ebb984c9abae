"""Put the trials of a sweep into a table: as its `sweep.json` has them, or while it runs, as its driver tells."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from cache_store.errors import ConfigError, CorruptRecord
from cache_store.records.record_io import read_local
from orchestrator.config.yaml_loader import leaves, load_document
from orchestrator.reports.record_json import from_json
from orchestrator.status.listing import CONFIG_FILE, TRIALS
from orchestrator.sweeps.page import ranked, trial_cells
from orchestrator.sweeps.plan import SEPARATOR
from orchestrator.sweeps.records import SweepSummary
from orchestrator.sweeps.session import SUMMARY_FILE
from orchestrator.sweeps.space import short_keys, value_text
from orchestrator.ui.records import RegimeView, SweepTable
from orchestrator.units import DASH

#: Characters of a filter, and its comparisons; longer ones first.
MOST_FILTER = 200
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_TERM = re.compile(r"([^<>=\s]+)(<=|>=|<|>|=)(\S+)")
#: Units of the cells. Times may have several: `3 min 20 s`.
_TIMES = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_UNITS = {**_TIMES, **_SIZES, **{f"{name}B": factor for name, factor in _SIZES.items()}}
_FIGURE = re.compile(r"(-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*")


def sweep_table(sweep_dir: Path, path: str, regimes: Sequence[RegimeView], *, running: bool) -> SweepTable:
    """Return all trials. `path`: the sweep's name in the folder that is shown; `regimes`: those of all trials, as the
    sweep is observed. While it runs, `sweep.json` is of an earlier invocation."""
    told = None if running else _told(sweep_dir)
    return _live(sweep_dir, path, regimes) if told is None else _final(told, path)


def _told(sweep_dir: Path) -> SweepSummary | None:
    try:
        found = read_local(sweep_dir / SUMMARY_FILE)
        return None if found is None else from_json(SweepSummary, found, SUMMARY_FILE)
    except CorruptRecord:
        return None


def _final(summary: SweepSummary, path: str) -> SweepTable:
    heads, *rows = trial_cells(summary)
    trials = ranked(summary)
    return SweepTable(
        metric=summary.compared_by.key,
        heads=heads,
        rows=tuple(rows),
        paths=tuple(f"{path}/{TRIALS}/{trial.folder}" for trial in trials),
        best=tuple(trial.best for trial in trials),
        total=len(rows),
    )


def _live(sweep_dir: Path, path: str, regimes: Sequence[RegimeView]) -> SweepTable:
    keys, before = _swept(sweep_dir), f"{settings_of(sweep_dir / CONFIG_FILE).get('run')}-"
    short = short_keys(keys)
    rows: list[tuple[str, ...]] = []
    paths: list[str | None] = []
    for folder in sorted((sweep_dir / TRIALS).glob(f"*/{CONFIG_FILE}")):
        settings = leaves(settings_of(folder))
        name = str(settings.get("run", folder.parent.name)).removeprefix(before)
        own = [regime for regime in regimes if regime.name.startswith(f"{name}{SEPARATOR}")]
        values = (value_text(settings.get(key, DASH)) for key in keys)
        rows.append((name, *values, _state(own), _stages(own), _scores(own, "validation"), _scores(own, "test")))
        paths.append(f"{path}/{TRIALS}/{folder.parent.name}")
    order = sorted(range(len(rows)), key=lambda index: rows[index][0])
    return SweepTable(
        metric="",
        heads=("trial", *(short[key] for key in keys), "status", "stages", "validation", "test"),
        rows=tuple(rows[index] for index in order),
        paths=tuple(paths[index] for index in order),
        best=(False,) * len(rows),
        total=len(rows),
    )


def _swept(sweep_dir: Path) -> list[str]:
    section = settings_of(sweep_dir / CONFIG_FILE).get("sweep")
    parameters = section.get("parameters") if isinstance(section, dict) else None
    return list(parameters) if isinstance(parameters, dict) else []


def settings_of(source: Path) -> Mapping[str, object]:
    """Read a configuration, again only when the file has changed; {} for one that cannot be read."""
    try:
        status = source.stat()
    except OSError:
        return {}
    return _read(str(source), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _read(source: str, changed_ns: int, size: int) -> Mapping[str, object]:
    try:
        return dict(load_document(source).data)
    except ConfigError:
        return {}


def _state(regimes: Sequence[RegimeView]) -> str:
    states = [regime.state for regime in regimes]
    for state in ("failed", "running", "stopped", "waiting"):
        if state in states:
            return state
    return "done" if states else "waiting"


def _stages(regimes: Sequence[RegimeView]) -> str:
    stages = [part for regime in regimes for part in regime.parts if part.stage]
    return f"{sum(part.done for part in stages)} of {len(stages)}"


def _scores(regimes: Iterable[RegimeView], split: str) -> str:
    found = {regime.name.partition(SEPARATOR)[2]: str(getattr(regime, split)) for regime in regimes}
    return ", ".join(f"{name} {text}" for name, text in found.items() if text) or DASH


def filtered(table: SweepTable, text: str) -> SweepTable:
    """Return the rows that meet every word of `text`: `lr<0.01`, `status=done` by a column's name (its beginning will
    do), any other word wherever it stands in the row."""
    terms = text[:MOST_FILTER].split()
    chosen = [index for index, row in enumerate(table.rows) if all(_meets(table.heads, row, term) for term in terms)]
    return SweepTable(
        metric=table.metric,
        heads=table.heads,
        rows=tuple(table.rows[index] for index in chosen),
        paths=tuple(table.paths[index] for index in chosen),
        best=tuple(table.best[index] for index in chosen),
        total=table.total,
    )


def _meets(heads: Sequence[str], row: Sequence[str], term: str) -> bool:
    match = _TERM.fullmatch(term)
    column = None if match is None else _column(heads, match.group(1))
    if match is None or column is None:
        return term.lower() in " ".join(row).lower()
    sign, wanted, cell = match.group(2), match.group(3), row[column]
    if sign == "=":
        return cell.lower() == wanted.lower() or (magnitude(cell) is not None and magnitude(cell) == magnitude(wanted))
    left, right = magnitude(cell), magnitude(wanted)
    return left is not None and right is not None and _OPERATORS[sign](left, right)


def _column(heads: Sequence[str], name: str) -> int | None:
    """Return the column called so, else the first whose name begins so."""
    lower = [head.lower() for head in heads]
    if name.lower() in lower:
        return lower.index(name.lower())
    return next((index for index, head in enumerate(lower) if head.startswith(name.lower())), None)


def magnitude(text: str) -> float | None:
    """Return what a cell says as a number, in seconds, bytes or as it is: `3 min 20 s`, `1.2 GB`, `97.3 %`, `2 of 3`
    (2). None for what begins with no number."""
    text = text.strip().lstrip("(")
    match = _FIGURE.match(text)
    if match is None:
        return None
    total, unit = _value(match), match.group(2)
    while unit in _TIMES and (match := _FIGURE.match(text, match.end())) and match.group(2) in _TIMES:
        total += _value(match)
    return total


def _value(match: re.Match[str]) -> float:
    return float(match.group(1).replace(",", "")) * _UNITS.get(match.group(2), 1.0)
