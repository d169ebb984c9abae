"""Check that all machines of a cluster see the same store and agree about the time, before anything is trained.

The driver writes a token; each machine reads it, and writes an answer that the driver reads. A folder that only one
machine has shows at once, instead of as missing files in the middle of a run. How a machine is asked is the runner's
business; here is what is asked, and what the answers mean.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass

from cache_store.errors import SegpropError, StoreError, UserError
from cache_store.records.record_io import new_attempt_id
from cache_store.storage.base import Storage
from cache_store.storage.open import existing_storage, open_storage

#: Clocks may differ by so much before it is worth a word. Nothing compares them: ages go by the store's clock.
CLOCK_WARNING_S = 30.0


@dataclass(frozen=True)
class Question:
    """What travels to a machine. Its folder begins as those of a store's other probes, which `segprop cache gc`
    clears."""

    store: str
    folder: str
    token: str


@dataclass(frozen=True)
class Answer:
    """What came back. `problem`: None when the token was there; `clock`: unix seconds on that machine."""

    name: str
    problem: str | None
    clock: float


def ask(store: str) -> Question:
    """Write the token."""
    question = Question(store, f".probe-{new_attempt_id()}", new_attempt_id())
    open_storage(store).write(f"{question.folder}/token", question.token.encode())
    return question


def answer(question: Question, name: str, machine: str) -> Answer:
    """Look for the token on a machine, and leave an answer called `name`."""
    problem = None
    try:
        storage = existing_storage(question.store)
        if storage.read(f"{question.folder}/token").decode() != question.token:
            problem = "another token is there"
        else:
            storage.write(f"{question.folder}/{name}", question.token.encode())
    except FileNotFoundError:
        problem = "a store is there, but not this one"
    except UserError:
        problem = "there is no such store"
    except SegpropError as error:
        problem = error.message
    return Answer(machine, problem, time.time())


def judge(question: Question, answers: Iterable[tuple[str, Answer]]) -> None:
    """Raise UserError naming the machines that do not see the store, or whose answers are not seen here. Clears up.

    `answers`: the name each was asked to leave, and what it said."""
    storage = open_storage(question.store)
    missing: list[str] = []
    try:
        for name, found in answers:
            problem = found.problem
            if problem is None and not _there(storage, question, name):
                problem = "what it wrote is not seen here"
            if problem is not None:
                missing.append(f"{found.name} ({problem})")
    finally:
        with contextlib.suppress(StoreError):
            storage.delete_tree(question.folder)
    if missing:
        raise UserError(
            f"store: {question.store}: no shared storage between the machines of this cluster: not seen by "
            f"{', '.join(sorted(missing))}. Allowed: a folder that every machine mounts at the same path, or a URI"
        )


def _there(storage: Storage, question: Question, name: str) -> bool:
    try:
        return storage.read(f"{question.folder}/{name}").decode() == question.token
    except FileNotFoundError:
        return False


def clock_warnings(answers: Iterable[Answer], sent: float, received: float) -> list[str]:
    """Name machines whose clock differs from the driver's by more than `CLOCK_WARNING_S`, whenever between `sent` and
    `received` they looked at it."""
    found = []
    for item in answers:
        off = max(sent - item.clock, item.clock - received, 0.0)
        if off > CLOCK_WARNING_S:
            sign = "behind" if item.clock < sent else "ahead of"
            found.append(
                f"the clock of {item.name} is {off:.0f} s {sign} the driver's; results do not depend on it, but times "
                "in the report will not add up"
            )
    return found
