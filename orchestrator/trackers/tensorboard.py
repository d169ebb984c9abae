"""Write TensorBoard event files: one folder a regime, epochs counted over all its stages.

The records are written with tensorboard's own protos and record writer; neither torch nor tensorflow is
imported. Each call replaces the folder, and the same points give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from orchestrator.trackers.base import LoggedPoint, Tracker

#: Below the run directory.
FOLDER = "tb"
#: Below the run directory: what stages tell while they train, by optimizer steps.
LIVE_FOLDER = "tb_live"


@contextmanager
def tensorboard(run_dir: Path) -> Iterator[Tracker]:
    """Write `tb/<regime>/events.out.tfevents.*` below `run_dir`; what was in `tb` before is replaced as a whole."""
    folder = run_dir / FOLDER
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    old = fresh.with_name(fresh.name + ".old")
    try:
        os.chmod(fresh, 0o755)
        with ExitStack() as files:
            yield _EventFiles(fresh, files)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class _EventFiles:
    """One event file a regime."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        """`files` closes what is opened here."""
        self._folder = folder
        self._files = files

    def start(self, regime: str, when: float) -> None:
        folder = self._folder / regime
        folder.mkdir(parents=True)
        path = folder / f"events.out.tfevents.{int(when)}.segprop"
        self._writer = RecordWriter(self._files.enter_context(path.open("wb")))
        self._write(Event(wall_time=when, file_version="brain.Event:2"))

    def log(self, point: LoggedPoint) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in point.figures.items()]
        self._write(Event(wall_time=point.when, step=point.step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


class LiveEvents:
    """Event files that grow while a run trains: one a regime and invocation, in `tb_live/<regime>`. A disk that does
    not take them stops nothing."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / LIVE_FOLDER
        self._files = ExitStack()
        self._writers: dict[str, RecordWriter | None] = {}

    def log(self, regime: str, step: int, when: float, figures: Mapping[str, float]) -> None:
        """Append figures of a regime, after so many optimizer steps of it; `when`: unix seconds."""
        if regime not in self._writers:
            self._writers[regime] = self._open(regime, when)
        writer = self._writers[regime]
        if writer is None:
            return
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        try:
            writer.write(Event(wall_time=when, step=step, summary=Summary(value=values)).SerializeToString())
            writer.flush()
        except OSError:
            self._writers[regime] = None

    def _open(self, regime: str, when: float) -> RecordWriter | None:
        try:
            (self._folder / regime).mkdir(parents=True, exist_ok=True)
            path = self._folder / regime / f"events.out.tfevents.{int(when)}.{os.getpid()}.segprop"
            writer = RecordWriter(self._files.enter_context(path.open("ab")))
            writer.write(Event(wall_time=when, file_version="brain.Event:2").SerializeToString())
        except OSError:
            return None
        return writer

    def close(self) -> None:
        """Close the files."""
        with suppress(OSError):
            self._files.close()
