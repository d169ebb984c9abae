"""List the kinds of tasks, one row each: the class of the task, and what planning and the driver ask of it.

Loads no torch. How a worker does a task is in `workers.tasks.execute`, under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from workers.specs import tasks
from workers.specs.memory import arithmetic

#: A task as JSON values.
Json = Mapping[str, Any]


def _whole(task: Json) -> Json:
    """Leave out where trusted model code lies (the experiment's digest says which it is), and what data may lose: it
    decides whether there are any, not which."""
    experiment = task.get("experiment")
    if experiment is None:
        return task
    model = _without(experiment["model"], "path", "revision")
    return {**task, "experiment": {**experiment, "model": model, "data": _without(experiment["data"], "allow_loss")}}


def _always(task: Any) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """One row."""

    spec: type[Any]
    #: Trains parts of the chain: a stage or a round of one. A gang may run it.
    trains: bool = False
    #: Makes a snapshot set, which may be released after its last reader and made again.
    makes_set: bool = False
    #: Scores a network: only the results wait for it, so it starts when nothing else is ready.
    scores: bool = False
    #: Asks a network questions.
    judges: bool = False
    #: Waits until no other score is ready either: nothing but the results needs it, and it takes long.
    late: bool = False
    #: Makes the weights that training starts from.
    initializes: bool = False
    #: Puts the data set into the store.
    prepares: bool = False
    #: Done by the packages of the model's family; false: by those of the data's domain.
    computes: bool = True
    #: Its outcome does not depend on the regime: labels do not name one.
    shared: bool = False
    #: The part of the task that decides its outcome, for the node's id: without where files lie or how often to save.
    identity: Callable[[Json], Json] = _whole
    #: Whether the task, as an object, asks for deterministic kernels.
    deterministic: Callable[[Any], bool] = _always


def _data_identity(task: Json) -> Json:
    """Leave out where files and tokenizer lie (fingerprint and digest say which they are), and what may be lost."""
    known = () if task.get("tokenizer") is None else ("tokenizer", "gguf")
    model = task["model"] and _without(task["model"], "path", "revision", *known)
    return {**task, "data": _without(task["data"], "path", "download", "allow_loss"), "model": model}


def _model_identity(task: Json) -> Json:
    """Leave out where the weights and their companions lie: the digests say which they are."""
    known = () if task.get("companions") is None else ("tokenizer",)
    return {**task, "model": _without(task["model"], "weights", "path", "revision", *known)}


def _wherever(task: Json) -> Json:
    """Leave out where frozen weights lie."""
    return _without(_whole(task), "frozen")


def _plain_boundary(task: Json) -> Json:
    """Leave out the plain encoding: ids are those from before there were others."""
    task = _wherever(task)
    if (task.get("boundary") or {}).get("encoding") != "plain":
        return task
    return {**task, "boundary": _without(task["boundary"], "encoding")}


def _stage_identity(task: Json) -> Json:
    task = _plain_boundary(task)
    train = _without(task["train"], "checkpoint_every_s")
    # Matrices under adapters were not rounded once: such a stage is another one since they are.
    rounds = {"rounds": 1} if train.get("lora") and train.get("frozen_weights", "full") != "full" else {}
    memory = arithmetic(task.get("memory") or {})
    return {**_without(task, "memory"), "train": train, **rounds, **({"memory": memory} if memory else {})}


def _questions_identity(task: Json) -> Json:
    """Leave out where files lie (the fingerprint says which they are), and what is allowed."""
    return _without(task, "path", *_ALLOWED)


def _judge_identity(task: Json) -> Json:
    """Leave out what is allowed, and what of the experiment made the weights: those have ids of their own, and the
    untouched model is the same whatever is trained on."""
    task = _whole(_without(task, *_ALLOWED))
    return {**task, "experiment": _without(task["experiment"], "data", "seed")}


def _boundaries_identity(task: Json) -> Json:
    """Leave out where frozen weights lie, and the plain encoding of what may be stored."""
    task = _wherever(task)
    if (task.get("stored") or {}).get("encoding") != "plain":
        return task
    return {**task, "stored": _without(task["stored"], "encoding")}


#: Permissions, which change no result.
_ALLOWED = ("allow_code_execution", "allow_unisolated", "allow_contaminated")


def _without(section: Json, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


TASKS: dict[str, TaskKind] = {
    "data": TaskKind(spec=tasks.DataTask, prepares=True, computes=False, shared=True, identity=_data_identity),
    "model": TaskKind(spec=tasks.ModelTask, initializes=True, shared=True, identity=_model_identity),
    "measure": TaskKind(spec=tasks.MeasureTask),
    "materialize": TaskKind(spec=tasks.MaterializeTask, makes_set=True, identity=_plain_boundary),
    "train": TaskKind(
        spec=tasks.StageTask,
        trains=True,
        identity=_stage_identity,
        deterministic=lambda task: bool(task.train.deterministic),
    ),
    "evaluate": TaskKind(spec=tasks.EvaluateTask, scores=True, identity=_wherever),
    "average": TaskKind(spec=tasks.AverageTask),
    "questions": TaskKind(spec=tasks.QuestionsTask, shared=True, identity=_questions_identity),
    # Generating has no deterministic kernels on every device.
    "judge": TaskKind(
        spec=tasks.JudgeTask,
        scores=True,
        judges=True,
        late=True,
        identity=_judge_identity,
        deterministic=lambda task: False,
    ),
    "boundaries": TaskKind(spec=tasks.BoundariesTask, scores=True, late=True, identity=_boundaries_identity),
}
