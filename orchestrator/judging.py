"""`segprop judge`: several model folders through the same benchmarks, side by side.

Everything that can be wrong (folders, tasks, data, missing packages, code execution that is not allowed) is found
before the first model is loaded; results are written after every task, so a long judgement that is interrupted
leaves what it has found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache_store.errors import DataError, UserError
from cache_store.suggest import nearest
from orchestrator.environment import describe_environment
from orchestrator.progress import Progress
from orchestrator.reports.summary import write_summary
from orchestrator.units import DASH
from workers.judge import harness, humaneval, problems
from workers.judge.model import DTYPES, Dtype, JudgedModel, check_folder, load_model
from workers.judge.scores import Score

TASKS = (*harness.TASKS, *problems.FILES)
FORMAT = 1
#: Wide enough for several models where the output is no terminal.
FILE_WIDTH = 170


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """What to ask and how. `data`: the folder that holds `mmlu/`, `winogrande/` and `humaneval/`; None: the hub, for
    MMLU and WinoGrande. `limit`: questions a task (for MMLU a subject)."""

    tasks: tuple[str, ...] = harness.TASKS
    data: Path | None = None
    shots: int = 5
    limit: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: Dtype = "auto"
    seed: int = 1234
    subjects: tuple[str, ...] | None = None
    max_new_tokens: int = 512
    allow_code_execution: bool = False
    allow_unisolated: bool = False

    def harness(self) -> harness.HarnessSpec:
        return harness.HarnessSpec(
            data=self.data,
            shots=self.shots,
            limit=self.limit,
            batch_size=self.batch_size,
            seed=self.seed,
            subjects=self.subjects,
        )

    def code(self) -> humaneval.CodeSpec:
        return humaneval.CodeSpec(
            allow_code_execution=self.allow_code_execution,
            allow_unisolated=self.allow_unisolated,
            limit=self.limit,
            batch_size=self.batch_size,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
        )


def judge(
    folders: Sequence[Path],
    settings: JudgeSettings,
    *,
    out: Path | None = None,
    quiet: bool = False,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Judge every folder by every task and return (and write to `out`) what came of it:

    `{"format", "settings", "environment", "models": [{"name", "folder", "scores": [Score], "seconds": {task: s}}]}`.
    UserError and DataError before any model is loaded, where that is possible."""
    names = check(folders, settings, out)
    found: dict[str, Any] = {
        "format": FORMAT,
        "settings": _plain(settings),
        "environment": describe_environment(),
        "models": [],
    }
    with Progress(len(folders) * len(settings.tasks), quiet=quiet, stream=stream) as progress:
        for folder, name in zip(folders, names, strict=True):
            model: dict[str, Any] = {"name": name, "folder": str(folder), "scores": [], "seconds": {}}
            found["models"].append(model)
            # One model at a time is in memory.
            judged = load_model(folder, device=settings.device, dtype=settings.dtype)
            for task in settings.tasks:
                label = f"{name}: {task}"
                started = time.monotonic()
                progress.started(label)
                score = _score(judged, task, settings, _reporting(progress, label))
                seconds = time.monotonic() - started
                progress.finished(label, seconds, reused=False)
                model["scores"].append(score.to_json())
                model["seconds"][task] = round(seconds, 3)
                if out is not None:
                    write_summary(out, found)
            del judged
    return found


def check(folders: Sequence[Path], settings: JudgeSettings, out: Path | None = None) -> list[str]:
    """The models' names, or one error that says all that is wrong with the request, as far as one can know."""
    found: list[str] = []

    def collect(step: Callable[[], object]) -> None:
        try:
            step()
        except UserError as error:
            found.append(error.message)

    for task in settings.tasks:
        if task not in TASKS:
            found.append(f"--tasks: there is no {task}{_suggestion(task)}; there are {', '.join(TASKS)}")
    for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1), ("max_new_tokens", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            found.append(f"--{name.replace('_', '-')}: {value}: must be at least {least}")
    if not settings.tasks:
        found.append(f"--tasks: names none; there are {', '.join(TASKS)}")
    for folder in folders:
        collect(partial(check_folder, folder))
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        found.append(f"--out: {out}: must be a file in a folder that exists")
    for task in settings.tasks:
        collect(partial(_check_task, task, settings))
    if found:
        raise UserError("\n  ".join(dict.fromkeys(found)) if len(found) > 1 else found[0])
    return labels(folders)


def dtype(name: str) -> Dtype:
    """`name` as a type of weights; UserError for others."""
    for known in DTYPES:
        if name == known:
            return known
    raise UserError(f"--dtype: {name}: must be one of {', '.join(DTYPES)}")


def labels(folders: Sequence[Path]) -> list[str]:
    """What to call each folder: as few of its last parts as tell it from the others."""
    parts = [folder.absolute().parts for folder in folders]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        names.append("/".join(mine[-length:]))
    return names


def table(found: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print the scores, a column a model; the difference to the first model stands beside each of the others."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=FILE_WIDTH)
    models = found["models"]
    out = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    out.add_column("Task")
    for heading in ("Metric", "Shots", "n"):
        out.add_column(heading, justify="right" if heading != "Metric" else "left", style="dim")
    for model in models:
        out.add_column(Text(model["name"]), justify="right", overflow="fold")
    by_model = [{score["task"]: score for score in _flat(model["scores"])} for model in models]
    depths = {task: depth for model in models for task, depth in _depths(model["scores"], 0)}
    for task, depth in depths.items():
        first = next(scores[task] for scores in by_model if task in scores)
        cells = [Text(_cell(scores.get(task), by_model[0].get(task), index)) for index, scores in enumerate(by_model)]
        title = Text("  " * depth + task, style="bold" if depth == 0 else "")
        out.add_row(title, first["metric"], str(first["shots"]), f"{first['n']:,}", *cells)
    console.print(out)


def _score(judged: JudgedModel, task: str, settings: JudgeSettings, progress: harness.Progress) -> Score:
    if task in harness.TASKS:
        return harness.score(judged, task, settings.harness(), progress)
    return humaneval.score(judged, task, _problems(task, settings), settings.code(), progress)


def _check_task(task: str, settings: JudgeSettings) -> None:
    if task in harness.TASKS:
        harness.demand_harness()
        if settings.data is not None and not (settings.data / task).is_dir():
            raise DataError(f"--data: {settings.data}: holds no folder {task}; without --data the hub is asked")
        harness.build_tasks(task, settings.harness())
    elif task in problems.FILES:
        _problems(task, settings)
        humaneval.demand_jail(settings.code())


def _problems(task: str, settings: JudgeSettings) -> tuple[problems.Problem, ...]:
    if settings.data is None:
        raise UserError(f"--data: {task} needs a folder that holds humaneval/{problems.FILES[task][0]}")
    return problems.read_problems(problems.find_file(settings.data, task))


def _reporting(progress: Progress, label: str) -> harness.Progress:
    def report(done: int, total: int) -> None:
        progress.update(label, label, phase="answering", done=done, total=total, unit="answers")

    return report


def _suggestion(task: str) -> str:
    close = nearest(task, TASKS)
    return "" if close is None else f"; did you mean {close}?"


def _plain(settings: JudgeSettings) -> dict[str, Any]:
    return {**asdict(settings), "data": None if settings.data is None else str(settings.data)}


def _flat(scores: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [item for score in scores for item in (score, *_flat(score["parts"]))]


def _depths(scores: Sequence[Mapping[str, Any]], depth: int) -> list[tuple[str, int]]:
    """Tasks and their groups as the table indents them. Single subjects are left to the JSON."""
    return [
        item
        for score in scores
        if depth == 0 or score["parts"]
        for item in ((score["task"], depth), *_depths(score["parts"], depth + 1))
    ]


def _cell(score: Mapping[str, Any] | None, reference: Mapping[str, Any] | None, index: int) -> str:
    if score is None:
        return DASH
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.2f}"
    text = f"{100 * score['value']:.2f}{error}"
    if index == 0 or reference is None:
        return text
    return f"{text} ({100 * (score['value'] - reference['value']):+.2f})"
