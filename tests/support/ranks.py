"""The ranks of a gang as plain processes with gloo: no Ray. Orders go in, commits or errors come out.

Imports nothing that reads the environment: a rank sets its own first.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: Where `make setup` puts DeepSpeed: ranks alone have it.
DEEPSPEED = Path(sys.prefix) / "deepspeed"


class Ranks:
    """`size` processes that run orders together; a context manager. `crash`: SEGPROP_CRASH of the last rank."""

    def __init__(self, folder: Path, size: int = 2, *, crash: str = "", timeout_s: float = 60) -> None:
        context = multiprocessing.get_context("spawn")
        folder.mkdir(parents=True, exist_ok=True)
        meeting = folder / f"meeting-{os.urandom(4).hex()}"
        self.lines: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            environment = {"SEGPROP_CRASH": crash} if crash and rank == size - 1 else {}
            process = context.Process(
                target=_rank, args=(rank, size, str(meeting), timeout_s, environment, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.lines.append(ours)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def run(self, order: Any, *, looks: int = 0, meddle: Callable[[], None] | None = None) -> list[Any]:
        """What every rank returned or raised; None of one that died. `looks`: ask to stop at the first rank's n-th
        look. `meddle`: sent to every rank, which calls it before the work."""
        for line in self.lines:
            try:
                line.send((order, looks, meddle))
            except OSError:
                continue
        return [_answer(line) for line in self.lines]


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
