"""List the benchmarks that models are judged by: a task is one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cache_store.errors import DataError, UserError
from workers.judge import harness, humaneval, outlook, problems
from workers.judge.model import Dtype, JudgedModel
from workers.judge.scores import Answered, Score


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
    #: Judge by questions that a model was trained on, too, and mark its scores.
    allow_contaminated: bool = False

    def harness(self) -> harness.HarnessSpec:
        """Return the part that is for lm-evaluation-harness."""
        return harness.HarnessSpec(
            data=self.data,
            shots=self.shots,
            limit=self.limit,
            batch_size=self.batch_size,
            seed=self.seed,
            subjects=self.subjects,
        )

    def code(self) -> humaneval.CodeSpec:
        """Return the part that is for generated code."""
        return humaneval.CodeSpec(
            allow_code_execution=self.allow_code_execution,
            allow_unisolated=self.allow_unisolated,
            limit=self.limit,
            batch_size=self.batch_size,
            seed=self.seed,
            max_new_tokens=self.max_new_tokens,
        )


@dataclass(frozen=True)
class Judge:
    """How to judge by one task; both are given its name. `check` raises UserError or DataError for what can be known to
    be wrong before a model is loaded; `score` asks a model; `asked`: its questions as published, where a model may
    have been trained on them."""

    check: Callable[[str, JudgeSettings], None]
    score: Callable[[JudgedModel, str, JudgeSettings, Answered], Score]
    asked: Callable[[str, JudgeSettings], list[str]] = lambda task, settings: []
    #: What it will ask, from local files alone.
    outlook: Callable[[outlook.Asking], outlook.Outlook] = lambda asking: outlook.Outlook()
    #: The settings, beside `limit`, `batch_size` and `dtype`, that decide its score.
    uses: frozenset[str] = frozenset()
    #: Packages that ask, beside what computes the model.
    libraries: tuple[str, ...] = ()
    #: It runs what the model writes.
    executes: bool = False
    title: str = ""


def _check_questions(task: str, settings: JudgeSettings) -> None:
    harness.demand_harness()
    if settings.data is not None and not (settings.data / task).is_dir():
        raise DataError(f"--data: {settings.data}: holds no folder {task}; without --data the hub is asked")
    harness.build_tasks(task, settings.harness())


def _score_questions(judged: JudgedModel, task: str, settings: JudgeSettings, report: Answered) -> Score:
    return harness.score(judged, task, settings.harness(), report)


def _asked(task: str, settings: JudgeSettings) -> list[str]:
    return harness.asked(task, settings.harness())


def _check_code(task: str, settings: JudgeSettings) -> None:
    _problems(task, settings)
    humaneval.demand_jail(settings.code())


def _score_code(judged: JudgedModel, task: str, settings: JudgeSettings, report: Answered) -> Score:
    return humaneval.score(judged, task, _problems(task, settings), settings.code(), report)


def _problems(task: str, settings: JudgeSettings) -> tuple[problems.CodeProblem, ...]:
    if settings.data is None:
        raise UserError(f"--data: {task} needs a folder that holds humaneval/{problems.FILES[task][0]}")
    return problems.read_problems(problems.find_file(settings.data, task))


_HARNESS = ("lm_eval",)
_GENERATED = frozenset({"max_new_tokens"})

JUDGES: Mapping[str, Judge] = {
    "mmlu": Judge(
        _check_questions,
        _score_questions,
        _asked,
        outlook.mmlu,
        frozenset({"shots", "subjects"}),
        _HARNESS,
        title="MMLU",
    ),
    "winogrande": Judge(
        _check_questions,
        _score_questions,
        _asked,
        outlook.winogrande,
        # The seed draws its examples.
        frozenset({"shots", "seed"}),
        _HARNESS,
        title="WinoGrande",
    ),
    **{
        task: Judge(
            _check_code,
            _score_code,
            outlook=partial(outlook.code, task),
            uses=_GENERATED,
            executes=True,
            title=title,
        )
        for task, title in (("humaneval", "HumanEval"), ("humaneval_plus", "HumanEval+"))
    },
}
