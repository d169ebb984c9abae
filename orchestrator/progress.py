"""What a run is doing, for people: a live table in a terminal, now and then a line everywhere else.

The driver calls from one thread; rich redraws from its own, so the few shared values are guarded by a lock.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.units import percent_text, rate_text, seconds_text
from workers.control import NOTHING, Update

#: Seconds between two plain lines about the same task.
INTERVAL_S = 10.0


@dataclass
class _Running:
    since: float
    said: float
    latest: Update = NOTHING


class Progress:
    """Shows a run of `total` tasks, `done` of which were finished before it began.

    `quiet` leaves only failures and notes. `stream` is standard error unless given: results go to standard
    output.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._reused = total, done, done
        self._quiet = quiet
        self._interval_s = interval_s
        self._clock = clock
        self._start = clock()
        self._running: dict[str, _Running] = {}
        self._failed = 0
        self._headline, self._headline_said = "", clock()
        self._lock = threading.RLock()
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        if self._console.is_terminal and not quiet:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)
            self._live.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def started(self, label: str) -> None:
        with self._lock:
            now = self._clock()
            self._running[label] = _Running(since=now, said=now)
        if self._live is None:
            self._say(Text(f"{label}: started"))

    def update(self, label: str, update: Update) -> None:
        """Latest figures of a running task; replaces the earlier ones."""
        with self._lock:
            now = self._clock()
            task = self._running.setdefault(label, _Running(since=now, said=now))
            if update != NOTHING:
                task.latest = update
            due = task.latest != NOTHING and now - task.said >= self._interval_s
            if due:
                task.said = now
        if due and self._live is None:
            self._say(Text(f"{label}: {describe(task.latest)}"))

    def finished(self, label: str, seconds: float | None, reused: bool, score: str = "") -> None:
        """Say that a task is done, and its `score`; `seconds` is None when it was made along with another task."""
        with self._lock:
            self._running.pop(label, None)
            self._done += 1
            self._reused += reused
            count = f"{self._done}/{self._total}"
        words = "reused" if reused else "made along" if seconds is None else f"done in {seconds_text(seconds)}"
        mark = Text.assemble(("✓ ", "green")) if self._live else Text()
        self._say(mark.append(f"{label}: {words}{score and f', {score}'} ({count})"))

    def dropped(self, label: str) -> None:
        """A task that nobody needs any more will not be run."""
        with self._lock:
            self._total -= 1
        self._say(Text(f"{label}: not needed"))

    def failed(self, label: str, message: str) -> None:
        with self._lock:
            self._running.pop(label, None)
            self._failed += 1
        self._say(Text.assemble((f"{label}: failed: {message}", "red")), always=True)

    def note(self, message: str) -> None:
        """Something worth knowing that does not end anything: a retry, a set that could not be released."""
        self._say(Text.assemble((message, "yellow")), always=True)

    def line(self, message: str) -> None:
        """Something that was to be expected: a trial is through."""
        self._say(Text(message))

    def headline(self, text: str) -> None:
        """How the whole is getting on: stays below the table, elsewhere said now and then when it has changed."""
        with self._lock:
            now = self._clock()
            due = text != self._headline and now - self._headline_said >= self._interval_s
            if due or self._live is not None:
                self._headline, self._headline_said = text, now
        if due and self._live is None:
            self._say(Text(text))

    def close(self) -> None:
        """Take the live table away. Safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _say(self, text: Text, *, always: bool = False) -> None:
        if self._quiet and not always:
            return
        self._console.print(text)

    def _render(self) -> RenderableType:
        with self._lock:
            now = self._clock()
            rows = [(label, task.since, task.latest) for label, task in self._running.items()]
            done, total, failed, headline = self._done, self._total, self._failed, self._headline
        table = Table.grid(padding=(0, 2))
        for label, since, latest in rows:
            share = completed(latest)
            table.add_row(
                Text(label, style="bold"),
                ProgressBar(total=1.0, completed=share, width=18) if share is not None else Text(""),
                Text(describe(latest) if latest != NOTHING else f"{seconds_text(now - since)}, starting"),
            )
        overall = Text.assemble(
            (f"{done} of {total} tasks", "bold"),
            f" · {seconds_text(now - self._start)}",
            f" · {self._reused} reused" if self._reused else "",
            (f" · {failed} failed", "red") if failed else "",
        )
        return Group(table, overall, *([Text(headline, style="bold")] if headline else []))


def completed(update: Update) -> float | None:
    """Share of a task that is done, 0..1; None when the update does not say."""
    if update.total:
        return min(1.0, (update.done or 0) / update.total)
    if update.epochs and update.epoch:
        within = (update.step or 0) / update.steps if update.steps else 0.0
        return min(1.0, (update.epoch - 1 + within) / update.epochs)
    return None


def describe(update: Update) -> str:
    """One line about a running task."""
    parts: list[str] = []
    if update.phase and update.phase != "train":
        parts.append(update.phase)
    if update.epoch is not None:
        parts.append(f"epoch {update.epoch}" + (f"/{update.epochs}" if update.epochs else ""))
    if update.step is not None and update.steps:
        parts.append(f"step {update.step}/{update.steps}")
    if update.done is not None and update.total:
        parts.append(f"{update.done:,}/{update.total:,} {update.unit or ''}".rstrip())
    if update.loss is not None:
        parts.append(f"loss {update.loss:.4f}")
    if update.accuracy is not None:
        parts.append(f"accuracy {percent_text(update.accuracy)}")
    if update.tokens_rate:
        parts.append(f"{rate_text(update.tokens_rate)} tokens/s")
    elif update.rate:
        parts.append(f"{rate_text(update.rate)}/s")
    if update.hits or update.misses:
        parts.append(f"cache {update.hits or 0:,} hits, {update.misses or 0:,} misses")
    if update.seconds_left is not None:
        parts.append(f"{seconds_text(update.seconds_left)} left")
    return ", ".join(parts) or "working"
