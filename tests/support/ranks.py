"""The ranks of a gang as plain processes with gloo: no Ray. Orders go in, commits or errors come out.

Imports nothing that reads the environment: a rank sets its own first.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: Exit codes of processes whose native code failed.
NATIVE_FAULTS = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT)
#: Where `make setup` puts DeepSpeed: ranks alone have it.
DEEPSPEED = Path(sys.prefix) / "deepspeed"


class Ranks:
    """`size` processes that run orders together; a context manager. `crash`: SEGPROP_CRASH of the last rank."""

    def __init__(self, folder: Path, size: int = 2, *, crash: str = "", timeout_s: float = 60) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._size, self._crash, self._timeout_s = folder, size, crash, timeout_s
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        meeting = self._folder / f"meeting-{os.urandom(4).hex()}"
        self.lines: list[Connection] = []
        self.processes = []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            environment = {"SEGPROP_CRASH": self._crash} if self._crash and rank == self._size - 1 else {}
            process = context.Process(
                target=_rank, args=(rank, self._size, str(meeting), self._timeout_s, environment, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.lines.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def run(self, order: Any, *, looks: int = 0, meddle: Callable[[], None] | None = None) -> list[Any]:
        """What every rank returned or raised; None of one that died. `looks`: ask to stop at the first rank's n-th
        look. `meddle`: sent to every rank, which calls it before the work.

        Where a rank died of a fault in native code (seen once in gloo's own thread, on a busy machine) the ranks are
        started again, once, and the order with them, as a driver does; a warning says so."""
        answers = self._run(order, looks, meddle)
        fault = next((process.exitcode for process in self.processes if process.exitcode in NATIVE_FAULTS), None)
        if fault is None:
            return answers
        warnings.warn(f"a rank died of {signal.Signals(-fault).name}; the gang was started again", stacklevel=2)
        self._end()
        self._start()
        return self._run(order, looks, meddle)

    def _run(self, order: Any, looks: int, meddle: Callable[[], None] | None) -> list[Any]:
        for line in self.lines:
            try:
                line.send((order, looks, meddle))
            except OSError:
                continue
        answers = [_answer(line) for line in self.lines]
        for answer, process in zip(answers, self.processes, strict=True):
            if answer is None:
                process.join(10)  # so that its exit code is known
        return answers


def _answer(line: Connection) -> Any:
    try:
        assert line.poll(300), "a rank hangs"
        return line.recv()
    except (EOFError, OSError):
        return None


def _rank(
    rank: int, size: int, meeting: str, timeout_s: float, environment: Mapping[str, str], line: Connection
) -> None:
    os.environ.update(environment)
    sys.path.append(str(DEEPSPEED))
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from workers.control import ThreadControl
    from workers.tasks.execute import execute

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )

    class Stopping(ThreadControl):
        left = 0

        def should_stop(self) -> bool:
            self.left -= 1
            return rank == 0 and self.left == 0

    while True:
        try:
            order, looks, meddle = line.recv()
        except EOFError:
            return
        control = Stopping()
        control.left = looks
        try:
            if meddle is not None:
                meddle()
            line.send(execute(order, control))
        except Exception as error:  # noqa: BLE001 - whatever it was, the test looks at it
            line.send(error)
