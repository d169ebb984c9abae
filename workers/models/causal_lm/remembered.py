"""Remember what models were found to be, so that a plan of the same model loads neither torch nor transformers.

A record an answer, in the user's cache folder, under a digest of all that decides it: the question, the versions of the
libraries, and our own code. Losing a record, or one that is damaged, costs asking again. Only good answers are
remembered; and none about checkpoints that bring their own code, which may read whatever it likes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import workers
from cache_store.errors import CorruptRecord, SegpropError
from cache_store.keys import digest_json
from cache_store.records.record_io import dump_record, read_local
from cache_store.storage.durable import write_atomically
from workers.file_digests import contents_digest
from workers.models.causal_lm.outline import LMOutline
from workers.models.causal_lm.pretrained.locate import PICKLES, Located, locate, wanted
from workers.specs.as_json import from_json, to_json
from workers.specs.language import CausalLMSpec
from workers.specs.task_kinds import TASKS
from workers.specs.tasks import DataTask
from workers.user_cache import user_cache
from workers.versions import installed

_log = logging.getLogger("segprop.models")

#: Records kept, those written last; one of a model takes 10 kB, of a deep one 100.
_RECORDS = 128
#: What computes figures, reads tokenizers and GGUF files.
_LIBRARIES = ("torch", "transformers", "tokenizers", "gguf", "huggingface_hub")


class Answer:
    """The record of one answer."""

    def __init__(self, question: str, decides: Mapping[str, Any]) -> None:
        """`decides`: JSON values that decide it, beside versions and our code."""
        code = contents_digest(_below(Path(workers.__file__).parent, "*.py"))
        whole = {"question": question, "versions": installed(_LIBRARIES), "code": code, **decides}
        self._path = user_cache("models") / f"{digest_json(whole)}.json"

    def read(self) -> dict[str, Any] | None:
        """Return what is remembered; None where nothing is."""
        try:
            return read_local(self._path)
        except CorruptRecord:
            return None

    def write(self, answer: Mapping[str, Any]) -> None:
        """Remember an answer, in place of the oldest ones. Silent where that is impossible: it only saves time."""
        try:
            write_atomically(self._path, dump_record(answer, str(self._path)))
            records = sorted(self._path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
            for outdated in records[:-_RECORDS]:
                outdated.unlink(missing_ok=True)
        except (OSError, SegpropError) as error:
            _log.debug("what a model is is not remembered: %s", error)

    def holds(self, ask: Callable[[], bool]) -> bool:
        """Return what `ask` says, asking no more once it was true."""
        if self.read() is not None:
            return True
        true = ask()
        if true:
            self.write({"holds": True})
        return true


def holds_of_data(question: str, task: DataTask, ask: Callable[[], bool]) -> bool:
    """Return what `ask` says of a data set with its tokenizer, asking no more once it was true of these."""
    if task.tokenizer is None or task.model is None or task.model.trust_remote_code:
        return ask()
    return Answer(question, {"task": TASKS["data"].identity(to_json(task))}).holds(ask)


def remembered_outline(spec: CausalLMSpec, look: Callable[[CausalLMSpec], LMOutline]) -> LMOutline:
    """Return what `look` finds of a model, from the record of an earlier time where nothing has changed since.
    ConfigError as `look`."""
    decides = _deciding(spec)
    if decides is None:
        return look(spec)
    answer = Answer("outline", decides)
    with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):  # a record of another shape
        if (record := answer.read()) is not None:
            return from_json(LMOutline, record)
    found = look(spec)
    # A file may have been written meanwhile.
    if _deciding(spec) == decides:
        answer.write(to_json(found))
    return found


def _deciding(spec: CausalLMSpec) -> dict[str, Any] | None:
    """What decides how a model is described; None where that cannot be told without looking. ConfigError, without the
    seconds that loading torch and transformers takes, where there is no such model."""
    tokenizer = None if spec.tokenizer in (None, "bytes") else Path(str(spec.tokenizer)).expanduser()
    if spec.trust_remote_code or (tokenizer is not None and not tokenizer.is_dir()):
        return None
    located = locate(spec, weights=False)
    try:
        return {
            "spec": to_json(spec),
            "commit": None if located is None else located.commit,
            "files": None if located is None else contents_digest(_looked_at(spec, located)),
            "unread": [] if located is None else sorted(_unread(located.folder)),
            "tokenizer": None if tokenizer is None else contents_digest(_below(tokenizer, "*")),
        }
    except (OSError, SegpropError):
        return None  # whoever looks says what is wrong


def _looked_at(spec: CausalLMSpec, located: Located) -> Iterator[tuple[str, Path]]:
    """Files of the model's folder: weights on this machine too, since tied ones are compared."""
    for pattern in wanted(spec, weights=located.commit is None):
        for path in located.folder.glob(pattern):
            if path.is_file():
                yield path.relative_to(located.folder).as_posix(), path


def _unread(folder: Path) -> Iterator[str]:
    for pattern in PICKLES:
        yield from (path.name for path in folder.glob(pattern))


def _below(folder: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob(pattern):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path
