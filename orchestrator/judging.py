"""Run `segprop judge`: several model folders through the same benchmarks, side by side.

Everything that can be wrong (folders, tasks, data, missing packages, code execution that is not allowed) is found
before the first model is loaded; results are written after every task, so a long judgement that is interrupted
leaves what it has found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache_store.errors import UserError
from cache_store.suggest import nearest
from orchestrator.environment import Environment, describe_environment
from orchestrator.progress import Progress
from orchestrator.reports.record_json import to_json
from orchestrator.reports.summary import write_summary
from orchestrator.units import DASH
from workers.control import Update
from workers.judge.contamination import Contamination, contamination, read_trained
from workers.judge.judges import JUDGES, JudgeSettings
from workers.judge.model import DTYPES, Dtype, check_folder, load_model
from workers.judge.scores import Answered, Score

FORMAT = 1
#: The key of a score's notes that says what the model was trained on of its questions.
CONTAMINATED = "contaminated"
#: Wide enough for several models where the output is no terminal.
FILE_WIDTH = 170


@dataclass(frozen=True)
class JudgedFolder:
    """One model with its scores so far, and the seconds each task took."""

    name: str
    folder: str
    scores: tuple[Score, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def with_score(self, task: str, score: Score, seconds: float) -> JudgedFolder:
        """Return the model with one more task judged."""
        return replace(self, scores=(*self.scores, score), seconds={**self.seconds, task: round(seconds, 3)})


@dataclass(frozen=True)
class Judgement:
    """What came of judging several models by the same tasks."""

    settings: JudgeSettings
    environment: Environment
    models: tuple[JudgedFolder, ...] = ()
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Return what `--out` holds: {"format", "settings", "environment", "models": [{"name", "folder", "scores",
        "seconds"}]}."""
        settings = {**asdict(self.settings), "data": None if self.settings.data is None else str(self.settings.data)}
        rest = to_json(replace(self, settings=JudgeSettings()))
        return {"format": rest["format"], "settings": settings, **{key: rest[key] for key in ("environment", "models")}}


def judge(
    folders: Sequence[Path],
    settings: JudgeSettings,
    *,
    out: Path | None = None,
    quiet: bool = False,
    stream: TextIO | None = None,
) -> Judgement:
    """Judge every folder by every task and return (and write to `out`, after every task) what came of it.

    UserError and DataError before any model is loaded, where that is possible."""
    names = check(folders, settings, out)
    found = Judgement(settings, describe_environment())
    with Progress(len(folders) * len(settings.tasks), quiet=quiet, stream=stream) as progress:
        for folder, name in zip(folders, names, strict=True):
            model, before = JudgedFolder(name, str(folder)), found.models
            # One model at a time is in memory.
            judged = load_model(folder, device=settings.device, dtype=settings.dtype)
            for task in settings.tasks:
                label = f"{name}: {task}"
                started = time.monotonic()
                progress.started(label)
                score = JUDGES[task].score(judged, task, settings, _reporting(progress, label))
                score = _marked(folder, task, settings, score)
                seconds = time.monotonic() - started
                progress.finished(label, seconds, reused=False)
                model = model.with_score(task, score, seconds)
                found = replace(found, models=(*before, model))
                if out is not None:
                    write_summary(out, found.to_json())
            del judged
    return found


def check(folders: Sequence[Path], settings: JudgeSettings, out: Path | None = None) -> list[str]:
    """Return the models' names. Raises one error with all that is wrong with the request, as far as one can know."""
    found: list[str] = []

    def collect(step: Callable[[], object]) -> None:
        try:
            step()
        except UserError as error:
            found.append(error.message)

    for task in settings.tasks:
        if task not in JUDGES:
            found.append(f"--tasks: there is no {task}{_nearest(task)}; there are {', '.join(JUDGES)}")
    for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1), ("max_new_tokens", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            found.append(f"--{name.replace('_', '-')}: {value}: must be at least {least}")
    if not settings.tasks:
        found.append(f"--tasks: names none; there are {', '.join(JUDGES)}")
    for folder in folders:
        collect(partial(check_folder, folder))
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        found.append(f"--out: {out}: must be a file in a folder that exists")
    for task in settings.tasks:
        if task in JUDGES:
            collect(partial(JUDGES[task].check, task, settings))
    if not found:
        # Last, since it reads every question.
        found += _contaminated(folders, settings)
    if found:
        raise UserError("\n  ".join(dict.fromkeys(found)) if len(found) > 1 else found[0])
    return labels(folders)


def _contaminated(folders: Sequence[Path], settings: JudgeSettings) -> list[str]:
    """Say which models were trained on questions they are to be judged by, unless that is allowed."""
    known = [(folder, trained) for folder in folders if (trained := read_trained(folder)) is not None]
    if not known or settings.allow_contaminated:
        return []
    asked = {task: JUDGES[task].asked(task, settings) for task in settings.tasks}
    return [
        f"{folder}: {task}: {found.words()}, such as {found.example!r}; --allow-contaminated judges it all the same "
        "and marks the score"
        for folder, trained in known
        for task in settings.tasks
        if (found := contamination(trained, asked[task])) is not None
    ]


def _marked(folder: Path, task: str, settings: JudgeSettings, score: Score) -> Score:
    """Note beside a score what the model was trained on of its questions."""
    trained = read_trained(folder)
    found = None if trained is None else contamination(trained, JUDGES[task].asked(task, settings))
    return score if found is None else replace(score, notes={**score.notes, CONTAMINATED: found.to_json()})


def dtype(name: str) -> Dtype:
    """Return `name` as a type of weights; UserError for others."""
    for known in DTYPES:
        if name == known:
            return known
    raise UserError(f"--dtype: {name}: must be one of {', '.join(DTYPES)}")


def labels(folders: Sequence[Path]) -> list[str]:
    """Choose what to call each folder: as few of its last parts as tell it from the others."""
    parts = [folder.absolute().parts for folder in folders]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        names.append("/".join(mine[-length:]))
    return names


def table(found: Judgement, stream: TextIO | None = None) -> None:
    """Print the scores, a column a model; the difference to the first model stands beside each of the others."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console = Console(file=stream, highlight=False, width=FILE_WIDTH)
    out = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    out.add_column("Task")
    for heading in ("Metric", "Shots", "n"):
        out.add_column(heading, justify="right" if heading != "Metric" else "left", style="dim")
    for model in found.models:
        out.add_column(Text(model.name), justify="right", overflow="fold")
    by_model = [{score.task: score for score in _flat(model.scores)} for model in found.models]
    depths = {task: depth for model in found.models for task, depth in _depths(model.scores, 0)}
    for task, depth in depths.items():
        first = next(scores[task] for scores in by_model if task in scores)
        cells = [Text(_cell(scores.get(task), by_model[0].get(task), index)) for index, scores in enumerate(by_model)]
        title = Text("  " * depth + task, style="bold" if depth == 0 else "")
        out.add_row(title, first.metric, str(first.shots), f"{first.n:,}", *cells)
    console.print(out)
    for model in found.models:
        for score in model.scores:
            if (note := score.notes.get(CONTAMINATED)) is not None:
                console.print(Text(f"{model.name}: {score.task}: {Contamination(**note).words()}", style="yellow"))


def _reporting(progress: Progress, label: str) -> Answered:
    def report(done: int, total: int) -> None:
        progress.update(label, Update(phase="answering", done=done, total=total, unit="answers"))

    return report


def _nearest(task: str) -> str:
    close = nearest(task, JUDGES)
    return "" if close is None else f"; did you mean {close}?"


def _flat(scores: Sequence[Score]) -> list[Score]:
    return [item for score in scores for item in (score, *_flat(score.parts))]


def _depths(scores: Sequence[Score], depth: int) -> list[tuple[str, int]]:
    """List tasks and their groups as the table indents them. Single subjects are left to the JSON."""
    return [
        item
        for score in scores
        if depth == 0 or score.parts
        for item in ((score.task, depth), *_depths(score.parts, depth + 1))
    ]


def _cell(score: Score | None, reference: Score | None, index: int) -> str:
    if score is None:
        return DASH
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.2f}"
    text = f"{100 * score.value:.2f}{error}"
    if index == 0 or reference is None:
        return text
    return f"{text} ({100 * (score.value - reference.value):+.2f})"
