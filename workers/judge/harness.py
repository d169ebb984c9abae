"""Judge by MMLU and WinoGrande through lm-evaluation-harness: its own task definitions, its own scoring.

With local files only the data set behind a task is swapped; prompts, metrics and the rule for choosing examples stay
those of the installed harness, so equal rows give equal scores. (WinoGrande draws its examples from the training
split at random: scores equal those from the hub when `train_xl.jsonl` is there; `Score.notes` says what was used.)

The harness is an optional dependency (`pip install segprop[eval]`) and is imported inside functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_store.errors import DataError, UserError
from workers.judge import local_data
from workers.judge.model import JudgedModel
from workers.judge.scores import Answered, Score

TASKS = ("mmlu", "winogrande")
#: Of a sentence with a blank: the columns that its question is made of.
_BLANK = ("sentence", "option1", "option2")


@dataclass(frozen=True, kw_only=True)
class HarnessSpec:
    """How to ask. `data`: the folder that holds `mmlu/` and `winogrande/`; None: the hub. `limit`: questions a task,
    for MMLU a subject. `subjects`: of MMLU, such as `("anatomy",)`; None: all 57."""

    data: Path | None = None
    shots: int = 5
    limit: int | None = None
    batch_size: int = 8
    seed: int = 1234
    subjects: tuple[str, ...] | None = None


def demand_harness() -> None:
    """Raise UserError when lm-evaluation-harness is not installed."""
    _import("lm_eval.evaluator")


def score(judged: JudgedModel, task: str, spec: HarnessSpec, progress: Answered | None = None) -> Score:
    """Return the accuracy of `judged` at `task` (one of `TASKS`), with the standard error of the mean. `progress`
    counts requests: a multiple-choice question is one a choice.

    Deterministic on one machine with one number of threads. UserError for unknown tasks, subjects or settings,
    DataError for missing or malformed files. `notes["answers"]` is a digest of all log-likelihoods."""
    built = build_tasks(task, spec)
    hflm = _import("lm_eval.models.huggingface").HFLM
    evaluate = _import("lm_eval.evaluator").evaluate
    with _quiet():
        lm = hflm(pretrained=judged.model, tokenizer=judged.tokenizer, batch_size=spec.batch_size)
        answers = _Answers(progress, _requests(built.tasks, spec))
        lm.set_cache_hook(answers)
        found = evaluate(
            lm,
            {"tasks": built.tasks, "groups": built.groups, "group_map": {}},
            limit=spec.limit,
            log_samples=False,
        )
    return _score(found["results"], task, built.groups, spec, {**built.notes, "answers": answers.digest()})


@dataclass(frozen=True)
class Built:
    """What the harness evaluates: its task objects and groups by name, and notes on the data."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    notes: dict[str, Any]


def build_tasks(task: str, spec: HarnessSpec) -> Built:
    """Build the harness' own objects. Reads (or downloads) all that `score` will need; the errors are those of
    `score`."""
    _check(task, spec)
    return _TASKS[task].build(_Definitions(_TASKS[task].folder), spec)


def asked(task: str, spec: HarnessSpec) -> list[str]:
    """List the questions of `task` with their choices, as published; the errors are those of `score`."""
    return [
        "\n".join((doc["question"], *doc["choices"]) if "choices" in doc else (doc[key] for key in _BLANK))
        for one in build_tasks(task, spec).tasks.values()
        for doc in itertools.islice(one.eval_docs, spec.limit)
    ]


class _Definitions:
    """The harness' definitions of one task alone: reading those of all its thousands takes seconds."""

    def __init__(self, folder: str) -> None:
        """`folder`: below `lm_eval/tasks`."""
        library = _import("lm_eval.tasks")
        place = Path(library.__file__).parent / folder
        self.index = library.TaskManager(include_path=place, include_defaults=False).task_index
        self._load = _import("lm_eval.tasks._yaml_loader").load_yaml

    def of(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = self._load(self.index[name].yaml_path)
        return value


def _build_winogrande(definitions: _Definitions, spec: HarnessSpec) -> Built:
    rows, source = local_data.winogrande(spec.data / "winogrande") if spec.data else (None, "hub, train")
    one = _build(definitions.of("winogrande"), rows, spec)
    return Built({"winogrande": one}, {}, {"data": _where(spec), "examples": source})


def _build_mmlu(definitions: _Definitions, spec: HarnessSpec) -> Built:
    root = definitions.of("mmlu")
    groups = {name: definitions.of(name) for name in root["task"]}
    members = {name: sorted(definitions.index[tag].tags) for name, group in groups.items() for tag in group["task"]}
    subjects = {definitions.of(name)["dataset_name"]: name for names in members.values() for name in names}
    tasks = {}
    for subject in _chosen(spec.subjects, list(subjects)):
        local = local_data.mmlu(spec.data / "mmlu", subject) if spec.data else None
        tasks[subjects[subject]] = _build(definitions.of(subjects[subject]), local, spec)
    notes = {"data": _where(spec), "examples": "dev, the first ones"}
    return Built(tasks, _grouped(root, groups, members, tasks), notes)


@dataclass(frozen=True)
class _Task:
    """Where a task's definitions lie below `lm_eval/tasks`, and how it is built of them."""

    folder: str
    build: Callable[[_Definitions, HarnessSpec], Built]


_TASKS = {"mmlu": _Task("mmlu/default", _build_mmlu), "winogrande": _Task("winogrande", _build_winogrande)}


def _check(task: str, spec: HarnessSpec) -> None:
    if task not in TASKS:
        raise UserError(f"task: {task}: the harness is used for {' and '.join(TASKS)}")
    for name, least in (("shots", 0), ("batch_size", 1), ("limit", 1)):
        value = getattr(spec, name)
        if value is not None and value < least:
            raise UserError(f"{name}: {value}: must be at least {least}")
    if task == "mmlu" and spec.shots > 5:
        raise UserError(f"shots: {spec.shots}: MMLU has five examples a subject, so at most 5")


def _chosen(wanted: tuple[str, ...] | None, known: list[str]) -> list[str]:
    if wanted is None:
        return sorted(known)
    unknown = [subject for subject in wanted if subject not in known]
    if unknown:
        raise UserError(f"subjects: MMLU has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return sorted(set(wanted))


def _where(spec: HarnessSpec) -> str:
    return "hub" if spec.data is None else "local"


def _build(definition: dict[str, Any], rows: dict[str, local_data.QuestionRows] | None, spec: HarnessSpec) -> Any:
    """Make one task object from the harness' definition of it with the data set swapped when there are `rows`."""
    config = {key: value for key, value in definition.items() if key not in ("tag", "group", "task_list")}
    name = config["task"]
    if rows is not None:
        empty = [split for split, found in rows.items() if not found]
        if empty:
            raise DataError(f"{name}: its {' and '.join(empty)} files in {spec.data} hold no questions")
        datasets = _import("datasets")
        config["custom_dataset"] = lambda **_: {
            split: datasets.Dataset.from_list(found) for split, found in rows.items()
        }
    try:
        with _quiet():
            built = _import("lm_eval.api.task").ConfigurableTask(config=config)
    except Exception as error:
        if rows is not None:
            raise
        raise UserError(
            f"{name}: its data set cannot be had from the hub ({type(error).__name__}: {error}); name a folder with "
            "local files as data (--data)"
        ) from error
    built.set_config(key="num_fewshot", value=spec.shots)
    built.set_fewshot_seed(seed=spec.seed)
    return built


def _grouped(
    root: dict[str, Any], groups: dict[str, Any], members: dict[str, list[str]], tasks: dict[str, Any]
) -> dict[str, Any]:
    """Make MMLU's own groups over the subjects that are there; the harness averages them as it always does."""
    group, config = _import("lm_eval.api.group").Group, _import("lm_eval.config.group").GroupConfig
    top = group.from_config(config(**root))
    out = {"mmlu": top}
    for name, definition in groups.items():
        present = [tasks[member] for member in members[name] if member in tasks]
        if present:
            out[name] = group.from_config(config(**definition))
            for item in present:
                out[name].add(item)
            top.add(out[name])
    return out


def _score(
    results: dict[str, Any], name: str, groups: dict[str, Any], spec: HarnessSpec, notes: dict[str, Any]
) -> Score:
    found = results[name]
    stderr = found.get("acc_stderr,none")
    children = groups[name].child_names if name in groups else []
    return Score(
        task=name,
        metric="acc",
        value=float(found["acc,none"]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        n=int(found["sample_len"]),
        shots=spec.shots,
        parts=tuple(_score(results, child, groups, spec, {}) for child in children),
        notes=notes,
    )


def _requests(tasks: dict[str, Any], spec: HarnessSpec) -> int:
    """Count the requests that the tasks will make: one for each choice of each question."""
    total = 0
    for task in tasks.values():
        questions = len(task.eval_docs) if spec.limit is None else min(spec.limit, len(task.eval_docs))
        total += questions * len(task.doc_to_choice(task.eval_docs[0]))
    return total


class _Answers:
    """Told by the harness of every answer (it is meant for caches): counts them, and takes a digest of their exact
    log-likelihoods, which tells two models apart long before their accuracies do."""

    def __init__(self, progress: Answered | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._hash = hashlib.sha256()

    def add_partial(self, kind: str, question: Any, answer: Any) -> None:
        self._hash.update(json.dumps([kind, question, answer]).encode())
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def digest(self) -> str:
        return self._hash.hexdigest()[:32]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness' own bars and notices: 57 subjects make hundreds of lines."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"judging by MMLU and WinoGrande needs lm-evaluation-harness ({error}): pip install segprop[eval]"
        ) from error
