"""Judge a network by a benchmark, as `segprop judge` judges the folder that is exported of it; before that, keep the
benchmark's questions and see whether they are trained on."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path

from cache_store.errors import DataError, Interrupted, UserError
from cache_store.keys import digest_json
from cache_store.records.nodes import Attempt, Commit, NodeStore
from cache_store.records.own_folder import OwnFolder
from workers.control import Control, Update
from workers.environment import WorkerEnvironment
from workers.export import Trained, export
from workers.judge.contamination import contamination
from workers.judge.judges import JUDGES, JudgeSettings
from workers.judge.model import load_model
from workers.judge.outlook import Asking
from workers.judge.question_files import QUESTIONS_FILE, fingerprint, pack, unpack
from workers.judge.scores import Answered
from workers.models.base import COMPANION
from workers.overlap import TrainedQuestions
from workers.specs.export_files import TRAINED_QUESTIONS
from workers.specs.orders import Parents
from workers.specs.results import HeldParts, JudgedScore, JudgeResult, Overlap, QuestionsResult
from workers.specs.tasks import JudgeTask, QuestionsTask

#: Name of a folder in the machine's temporary one, for a network while it is asked.
PREFIX = "segprop-judge-"
#: Seconds between two looks at whether the run is being stopped.
_LOOK_S = 0.5


def keep_questions(task: QuestionsTask, parents: Parents, environment: WorkerEnvironment, attempt: Attempt) -> Commit:
    """Read all questions as the judge will, look for those trained on, and keep their files.

    DataError for files that are malformed or not those that were planned with; UserError where questions are trained
    on and that is not allowed, or where this machine cannot judge."""
    started = time.monotonic()
    data, row = Path(task.path), JUDGES[task.benchmark]
    files = row.outlook(Asking(data=data, limit=task.limit, subjects=task.subjects)).files
    try:
        if fingerprint(data, files) != task.fingerprint:
            raise DataError(f"{data}: the questions of {task.benchmark} have changed since the run was planned")
        packed = pack(data, files)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    settings = JudgeSettings(
        data=data,
        # More examples than a benchmark has are refused when a run is planned.
        shots=0,
        limit=task.limit,
        subjects=task.subjects,
        allow_code_execution=task.allow_code_execution,
        allow_unisolated=task.allow_unisolated,
    )
    row.check(task.benchmark, settings)
    found = _overlap(task, settings, trained_questions(parents, environment.nodes))
    if found is not None and not task.allow_contaminated:
        raise UserError(
            f"{task.benchmark}: the model is trained on {found.same} of the {found.asked} questions it is to be judged "
            f"by, and on near-duplicates of {found.near} others, such as {found.example!r}; "
            "evaluation.judge.allow_contaminated: true judges it all the same and marks the score"
        )
    attempt.write(QUESTIONS_FILE, packed)
    result = QuestionsResult(
        benchmark=task.benchmark,
        contaminated=found,
        seconds=time.monotonic() - started,
        where=environment.where(),
    )
    return attempt.commit(result.to_json())


def judge(task: JudgeTask, parents: Parents, environment: WorkerEnvironment, attempt: Attempt) -> Commit:
    """Export the network into a folder of its own for as long as it is asked, and commit what the benchmark says. One
    that the stage has left as it was has the score it had.

    Interrupted when the run is being stopped: the benchmark then begins anew."""
    started = time.monotonic()
    weights = _weights_digest(parents)
    before = None if "before" not in parents else parents["before"].read(JudgeResult)
    if before is not None and before.weights == weights:
        same = replace(before, seconds=time.monotonic() - started, where=environment.where())
        return attempt.commit(same.to_json())
    questions = parents["questions"]
    with OwnFolder(Path(tempfile.gettempdir()), PREFIX) as place:
        data, folder = place / "data", place / "model"
        unpack(environment.nodes.read_file(questions.files[QUESTIONS_FILE]), data)
        environment.control.progress(Update(phase="export"))
        export(_network(task, parents), environment.nodes, folder)
        judged = load_model(folder, device=str(environment.device), dtype=task.dtype)
        found = JUDGES[task.benchmark].score(
            judged, task.benchmark, settings_of(task, data), _reporting(environment.control)
        )
    result = JudgeResult(
        benchmark=task.benchmark,
        score=JudgedScore.from_json(found.to_json()),
        contaminated=questions.read(QuestionsResult).contaminated,
        metrics={"accuracy": found.value},
        weights=weights,
        seconds=time.monotonic() - started,
        where=environment.where(),
    )
    return attempt.commit(result.to_json())


def _weights_digest(parents: Parents) -> str:
    """Identify the weights of all parts, whichever nodes hold them."""
    digests: dict[str, str] = {}
    for role, commit in sorted(parents.items()):
        if role.startswith("weights/"):
            part, held = role.removeprefix("weights/"), commit.read(HeldParts)
            known = held.parts.get(part)
            digests[part] = commit.files[held.file_of(part)].sha256 if known is None else known.digest
    return digest_json(digests)


def settings_of(task: JudgeTask, data: Path) -> JudgeSettings:
    """Return the settings of a judge that asks the questions below `data`."""
    names = {field.name for field in dataclasses.fields(JudgeSettings)} & {
        field.name for field in dataclasses.fields(JudgeTask)
    }
    given = {name: value for name in names if (value := getattr(task, name)) is not None}
    return JudgeSettings(tasks=(task.benchmark,), data=data, **given)


def trained_questions(parents: Parents, nodes: NodeStore) -> TrainedQuestions | None:
    """Read the digests of what the run trains on, and of what its model was trained on before; None without any."""
    files = [
        commit.files[name]
        for role, name in (("data", TRAINED_QUESTIONS), ("model", f"{COMPANION}{TRAINED_QUESTIONS}"))
        if (commit := parents.get(role)) is not None and name in commit.files
    ]
    found = [TrainedQuestions.from_bytes(nodes.read_file(file), file.path) for file in files]
    return reduce(or_, found) if found else None


def _overlap(task: QuestionsTask, settings: JudgeSettings, trained: TrainedQuestions | None) -> Overlap | None:
    if trained is None:
        return None
    found = contamination(trained, JUDGES[task.benchmark].asked(task.benchmark, settings))
    return None if found is None else Overlap.from_json(found.to_json())


def _network(task: JudgeTask, parents: Parents) -> Trained:
    parts = {role.removeprefix("weights/"): commit for role, commit in parents.items() if role.startswith("weights/")}
    return Trained(task.experiment, parts, lambda: parents["model"])


def _reporting(control: Control) -> Answered:
    """Report how far the answers are, at which rate, and what is left."""
    started = looked = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal looked
        now = time.monotonic()
        if now - looked < _LOOK_S and done < total:
            return
        looked = now
        if done < total and control.should_stop():
            raise Interrupted("judging was stopped; the benchmark begins anew with the next run")
        rate = done / max(now - started, 1e-9)
        control.progress(
            Update(
                phase="answering",
                done=done,
                total=total,
                unit="answers",
                rate=rate,
                seconds_left=(total - done) / rate if rate else None,
            )
        )

    return report
