"""Rules about the benchmarks of `evaluation.judge`, and a look at the files that hold their questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cache_store.errors import UserError
from orchestrator.config.schema import Config, JudgeConfig
from workers.judge.judges import JUDGES
from workers.judge.outlook import Asking
from workers.judge.question_files import fingerprint
from workers.judge.sandbox import demand
from workers.models.base import Finding
from workers.versions import installed

AT = ("evaluation", "judge")


@dataclass(frozen=True)
class Questions:
    """What a benchmark will ask. `fingerprint`: identity of its files; `libraries`: package -> version, of those that
    ask; `requests` and `tokens`, about, go through the model."""

    fingerprint: str
    libraries: Mapping[str, str] = field(default_factory=dict)
    requests: int = 0
    tokens: int = 0


def problems(config: Config) -> Iterator[Finding]:
    """Check what can be known without the files: models can be asked, and the permissions are there."""
    judge = config.evaluation.judge
    if judge is None:
        return
    refusal = config.family.traits.can.judged
    if refusal is not None:
        yield AT, f"{refusal}; allowed here: null"
        return
    if "mmlu" not in judge.tasks and judge.subjects is not None:
        yield (*AT, "subjects"), "are those of MMLU, which is not among the tasks; allowed: null"
    if any(JUDGES[task].executes for task in judge.tasks):
        try:
            demand(judge.allow_code_execution)
        except UserError as error:
            yield (*AT, "allow_code_execution"), error.message.removeprefix("allow_code_execution: ")


def look(config: Config, findings: list[Finding]) -> dict[str, Questions]:
    """Look at the files of every benchmark that is asked for; what is wrong with them is appended to `findings`."""
    judge = config.evaluation.judge
    if judge is None or config.family.traits.can.judged is not None:
        return {}
    found: dict[str, Questions] = {}
    for task in judge.tasks:
        try:
            found[task] = _look(task, judge)
        except UserError as error:
            findings.append(((*AT, "data"), f"{task}: {error.message}"))
        except OSError as error:
            findings.append(((*AT, "data"), f"{task}: {error.filename}: cannot be read: {error.strerror}"))
    return found


def _look(task: str, judge: JudgeConfig) -> Questions:
    data, row = Path(judge.data), JUDGES[task]
    asking = Asking(
        data=data,
        shots=judge.shots,
        limit=judge.limit,
        subjects=judge.subjects,
        max_new_tokens=judge.max_new_tokens,
    )
    seen = row.outlook(asking)
    return Questions(fingerprint(data, seen.files), installed(row.libraries), seen.requests, seen.tokens)
