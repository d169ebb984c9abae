"""Run `segprop generate`: ask an exported language model, once or line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cache_store.errors import UserError
from orchestrator.judging import dtype as dtype_called
from workers.judge.answering import Conversation, Sampling, Turn
from workers.judge.model import check_folder, load_model

#: Folder of a run directory in which models are, one a regime.
MODELS = "model"


def model_folder(folder: Path) -> Path:
    """Return the model that a folder is or, as a run directory, has: the only one. UserError where there are several,
    with their names; DataError where it is none."""
    models = sorted(found.parent for found in (folder / MODELS).glob("*/config.json"))
    if (folder / "config.json").is_file() or not models:
        check_folder(folder)
        return folder
    if len(models) > 1:
        raise UserError(f"{folder}: has {len(models)} models, name one: {', '.join(map(str, models))}")
    return models[0]


def generate(
    folder: Path,
    prompt: str | None,
    sampling: Sampling,
    *,
    system: str | None = None,
    raw: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    given: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Print the answer to `prompt`; without one, to every line of `given` (standard input), as one conversation."""
    if raw and system is not None:
        raise UserError("--system: is a turn of a chat; not with --raw")
    source, target = given or sys.stdin, out or sys.stdout
    place = model_folder(folder)
    conversation = Conversation(load_model(place, device=device, dtype=dtype_called(dtype)), sampling, raw)
    if not conversation.chats and not raw:
        print(f"segprop: {place} has no chat template: prompts are continued as they are", file=sys.stderr)
        if system is not None:
            raise UserError(f"--system: {place} has no chat template")
    if system is not None:
        conversation.turns.append(Turn("system", system))

    def write(text: str) -> None:
        target.write(text)
        target.flush()

    for asked in [prompt] if prompt is not None else _lines(source, target):
        conversation.answer(asked, write)
        write("\n")


def _lines(source: TextIO, target: TextIO) -> Iterator[str]:
    """Yield lines that are not empty, with a mark before each where a person types them."""
    while True:
        if source.isatty():
            target.write("> ")
            target.flush()
        line = source.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
