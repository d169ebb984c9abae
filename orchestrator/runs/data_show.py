"""`segprop data show`: the first samples of a configuration's data, before anything trains. Needs no store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.text import Text

from cache_store.errors import ConfigError
from orchestrator.config import load as configuration
from orchestrator.config.yaml_loader import Document
from workers.data.text.preview import Preview, Run, ShownSample

#: Around what counts where there are no colours.
_OPEN, _CLOSE = "⟦", "⟧"
_STYLE = "bold green"
#: Splits that can be shown.
SPLITS = ("train", "validation", "test")
#: Tokens of a sample that are listed with their numbers.
_LISTED = 400


def preview(document: Document, split: str, rows: int) -> Preview:
    """Read the first samples of a split. ConfigError or DataError for whatever keeps them from being read."""
    if split not in SPLITS:
        raise ConfigError(f"--split: {split!r}; allowed: {', '.join(SPLITS)}")
    config = configuration.check(document).sound()
    return config.domain.preview(config.data, config.family.tokenizing(config.model), config.seed, split, rows)


def show(found: Preview, split: str, *, tokens: bool = False, stream: TextIO | None = None) -> None:
    """Print a preview: targets in colour on a terminal, between markers elsewhere. `tokens`: list them, too."""
    stream = sys.stdout if stream is None else stream
    console = Console(file=stream, highlight=False, soft_wrap=True)
    marks = ("", "") if console.is_terminal else (_OPEN, _CLOSE)
    for line in _lines(found, split, marks, tokens=tokens):
        console.print(line)


def _lines(found: Preview, split: str, marks: tuple[str, str], *, tokens: bool) -> Iterator[Text]:
    how = Text.assemble(f"{split}: {found.documents} documents. ", (f"{marks[0]}Targets{marks[1]}", _STYLE))
    yield how.append(" are what the loss counts.")
    for number, sample in enumerate(found.samples, 1):
        yield Text(f"\n{number}: {_counts(sample)}", style="dim")
        yield Text().join(_run(run, run.text, marks) for run in sample.runs)
        if tokens:
            yield Text().join(_listed(sample, marks))
    yield Text()
    yield from map(Text, _summary(found))


def _counts(sample: ShownSample) -> str:
    cut = f" ({sample.cut} more are cut off: data.sequence_length)" if sample.cut else ""
    return f"{sample.where}, {sample.tokens} tokens{cut}, {sample.targets} targets"


def _run(run: Run, text: str, marks: tuple[str, str]) -> Text:
    return Text(f"{marks[0]}{text}{marks[1]}", style=_STYLE) if run.target else Text(text)


def _listed(sample: ShownSample, marks: tuple[str, str]) -> Iterator[Text]:
    """The numbers of the tokens, as many as fit a screen."""
    left = _LISTED
    for run in sample.runs:
        yield _run(run, " ".join(map(str, run.tokens[:left])), marks).append(" ")
        left -= len(run.tokens)
        if left <= 0:
            yield Text(f"… ({sample.tokens} in all)")
            return


def _summary(found: Preview) -> Iterator[str]:
    tokens = sum(sample.tokens for sample in found.samples)
    targets = sum(sample.targets for sample in found.samples)
    joined = f"; documents are joined into samples of {found.joined} tokens" if found.joined is not None else ""
    yield f"{len(found.samples)} shown: {tokens} tokens, {targets} targets ({targets / max(tokens, 1):.0%}){joined}."
    yield from (f"Note: {note}." for note in found.notes)
    yield from (f"Warning: {finding}." for finding in found.findings)
    yield from (f"Cannot be used: {problem}" for problem in found.problems)
