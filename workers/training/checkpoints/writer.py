"""Write the checkpoints of a stage in a thread beside its steps, one at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from workers.training.checkpoints.live import LiveTensors


@dataclass
class Timing:
    """Seconds of one checkpoint: `waited` by the training thread, `beside` it while it trained."""

    waited: float = 0.0
    beside: float = 0.0


class CheckpointWriter:
    """Writes checkpoints. All methods belong to the thread that trains."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stream: LiveTensors | None = None
        self._failure: Exception | None = None
        self._begun = self._ended = 0.0
        self._waited = 0.0
        #: Of the last checkpoint that was written.
        self.timing: Timing | None = None

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written."""
        return self._thread is None and self._failure is not None

    def begin(self, stream: LiveTensors, publish: Callable[[], None]) -> None:
        """Begin a checkpoint, after the one that is being written. `publish` writes the stream and makes it count, in a
        thread of its own."""
        before = time.monotonic()
        self.wait()
        self._failure, self._stream = None, stream
        self._begun, self._waited = time.monotonic(), time.monotonic() - before
        self._thread = threading.Thread(
            target=self._write, args=(stream, publish), name="segprop-checkpoint", daemon=True
        )
        self._thread.start()

    def _write(self, stream: LiveTensors, publish: Callable[[], None]) -> None:
        try:
            publish()
        except Exception as error:  # noqa: BLE001  the thread that trains raises it, where it must
            self._failure = error
        finally:
            stream.end()
            self._ended = time.monotonic()

    def before_update(self) -> None:
        """Return as soon as the stage's tensors may be changed."""
        if self._stream is None:
            return
        before = time.monotonic()
        self._stream.before_update()
        self._waited += time.monotonic() - before
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written. A failure is kept for `failed` and `finish`."""
        if self._thread is None:
            return
        before = time.monotonic()
        self._thread.join()
        self._waited += time.monotonic() - before
        self._thread = self._stream = None
        if self._failure is None:
            self.timing = Timing(self._waited, max(0.0, self._ended - self._begun - self._waited))

    def finish(self) -> None:
        """As `wait`; raises what the checkpoint failed of."""
        self.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def give_up(self) -> None:
        """End the checkpoint that is being written, if any, in the middle."""
        if self._stream is not None:
            self._stream.end()
        self.wait()
        self._failure = None
