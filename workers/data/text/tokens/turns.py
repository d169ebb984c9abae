"""Where the answers of a conversation lie in what a chat template wrote, for templates that do not mark them.

Everything is found by rendering: the messages before an answer with the prompt for one say where it begins, and the
same messages with another answer say where it ends, because what follows stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cache_store.errors import DataError
from workers.data.text.corpora.conversations import ANSWERS
from workers.data.text.tokens.exact import Span

Messages = list[dict[str, Any]]


class Render(Protocol):
    def __call__(self, messages: Messages, *, prompt: bool = False) -> str:
        """Return what the template writes; with `prompt`, what asks for an answer behind it. DataError: it refuses."""


@dataclass(frozen=True)
class _View:
    """A rendering that begins like the whole text up to the answer's `end`. `begin`: where it first depends on the
    answer. `closing`: with what the template closes a turn ("" where nothing, or not known); `closed`: the answer's
    own end is part of it."""

    begin: int
    end: int
    closing: str
    closed: bool = False


class TurnFinder:
    """Finds answers for one tokenizer. `added`: texts of its added tokens; `bos`, `eos`: those of two of them."""

    def __init__(self, added: Iterable[str], bos: str | None, eos: str | None) -> None:
        marks = sorted({token for token in added if token.strip()}, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, marks)) or "(?!)")
        ends = [token for token in marks if token != bos or token == eos]
        self._ending = re.compile(rf"\s*({'|'.join(map(re.escape, ends)) or '(?!)'})")
        self._eos = eos

    def find(self, messages: Messages, learned: Sequence[int], render: Render) -> tuple[str, list[Span], int]:
        """Return the whole text, the span of each learned answer, and how many of them nothing ends.

        A span goes from behind the prompt for an answer up to and with its stop marker. That is what closes a turn, or
        the added token that comes next, where a turn ends only as the next role begins. Where the template writes
        neither behind the last message, the marker that another turn would bring is put there, else the end-of-text
        token.

        ValueError, saying why: an answer cannot be told from the rest.
        """
        text = render(messages)
        spans: list[Span] = []
        endless = 0
        for turn in learned:
            view = self._view(text, messages, turn, render)
            start = self._start(text, messages, turn, view, render)
            stop = view.end
            if not view.closed:
                text, stop = self._stop(text, messages, turn, view, render)
                endless += stop == view.end
            spans.append((start, stop))
        return text, spans, endless

    def _view(self, text: str, messages: Messages, turn: int, render: Render) -> _View:
        mark = _unused(text)
        before, own = messages[:turn], messages[turn]
        plain = {"role": ANSWERS, "content": mark}
        for following in ([], [{"role": "user", "content": "?"}]):
            try:
                shown, masked = render([*before, own, *following]), render([*before, plain, *following])
            except DataError:
                continue
            if mark not in masked:
                raise ValueError(
                    "the chat template does not write contents of the assistant that are one text; allowed: a template "
                    "for text alone"
                )
            begin, end = self._shared(shown, masked)
            behind = masked.partition(mark)[2]
            if not following and behind.strip() and not shown[end:].strip():
                # This answer is closed in another way than a plain one, as tool calls are by some templates.
                end = len(shown.rstrip())
                if text.startswith(shown[:end]):
                    return _View(begin, end, "", closed=True)
            if begin <= end and text.startswith(shown[:end]):
                return _View(begin, end, "" if following else self._closing(behind, [*before, plain], mark, render))
        raise ValueError(
            f"the chat template writes the turns before message {turn} differently once it follows, so its answer "
            "cannot be found; allowed: a template that marks answers with {% generation %}, or one that only ever "
            "appends"
        )

    def _closing(self, behind: str, messages: Messages, mark: str, render: Render) -> str:
        """Return the part of `behind`, which the template writes after the last message, that closes the turn. What
        ends the whole text is left out."""
        if len(self._added.findall(behind)) > 1:
            other = self._behind(messages, mark, render)
            common = _common(behind, other)
            for match in self._added.finditer(behind):
                if match.start() < common < match.end():
                    common = match.start()
            behind = behind[:common]
        ends = [match.end() for match in self._added.finditer(behind)]
        return behind[: ends[-1]] if ends else behind.rstrip()

    def _behind(self, messages: Messages, mark: str, render: Render) -> str:
        """Return what the template writes behind the last message, in which `mark` is, when the user speaks next."""
        try:
            return render([*messages, {"role": "user", "content": "?"}]).partition(mark)[2]
        except DataError:
            return ""

    def _shared(self, shown: str, masked: str) -> tuple[int, int]:
        """Find where `shown` first and last differs from `masked`; never inside an added token."""
        begin = _common(shown, masked)
        end = max(begin, len(shown) - _common(shown[::-1], masked[::-1]))
        for match in self._added.finditer(shown):
            if match.start() < begin < match.end():
                begin = match.start()
            if match.start() < end < match.end():
                end = match.end()
        return begin, end

    def _start(self, text: str, messages: Messages, turn: int, view: _View, render: Render) -> int:
        if turn == 0:  # no template renders nothing at all
            return view.begin
        try:
            plain, prompt = render(messages[:turn]), render(messages[:turn], prompt=True)
        except DataError:
            return view.begin
        if not text.startswith(prompt) or len(prompt) > view.end:
            return view.begin
        # A template that knows no prompt writes the header of a turn only with the turn.
        header = prompt == plain and text[len(prompt) : view.begin].strip()
        return view.begin if header else len(prompt)

    def _stop(self, text: str, messages: Messages, turn: int, view: _View, render: Render) -> tuple[str, int]:
        """Return the whole text, with a stop marker where it lacked one, and where the answer's marker ends."""
        if view.closing and text.startswith(view.closing, view.end):
            return text, view.end + len(view.closing)
        if found := self._ending.match(text, view.end):
            return text, found.end()
        if text[view.end :].strip() or turn + 1 < len(messages):
            return text, view.end
        text = text[: view.end] + self._marker(text, messages[:turn], render)
        return text, len(text)

    def _marker(self, text: str, before: Messages, render: Render) -> str:
        """Return what ends an answer behind which the template writes nothing."""
        mark = _unused(text)
        if found := self._ending.match(self._behind([*before, {"role": ANSWERS, "content": mark}], mark, render)):
            return found.group(1)
        if self._eos is None:
            raise ValueError(
                "the chat template writes nothing behind an answer, and the tokenizer has no end-of-text token, so "
                "the model could not learn to stop; allowed: a template that closes its turns"
            )
        return self._eos


def _unused(text: str) -> str:
    """Choose a character that is not in a text."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _common(one: str, other: str) -> int:
    """Count the characters that two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
