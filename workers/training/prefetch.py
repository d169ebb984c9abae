"""Run an iterator ahead of its consumer, in one background thread."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _Channel(Generic[T]):
    """What the two threads share. It does not refer to the Prefetch, so a forgotten Prefetch can be
    collected."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.items: deque[T] = deque()
        self.changed = threading.Condition()
        self.stopped = False  # by the consumer
        self.finished = False  # by the producer
        self.error: BaseException | None = None

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.items.clear()
            self.changed.notify_all()

    def send(self, item: T) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.items) < self.depth)
            if self.stopped:
                return False
            self.items.append(item)
            self.changed.notify_all()
            return True

    def produce(self, iterable: Iterable[T]) -> None:
        error: BaseException | None = None
        try:
            iterator = iter(iterable)
            try:
                while not self.stopped:
                    try:
                        item = next(iterator)
                    except StopIteration:
                        break
                    if not self.send(item):
                        break
                    # Not held while the next item is made: the consumer may have reused or dropped it.
                    del item
            finally:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
        except BaseException as caught:  # noqa: BLE001  raised again in the consumer
            error = caught
        with self.changed:
            self.error = error
            self.finished = True
            self.changed.notify_all()


class Prefetch(Iterator[T], contextlib.AbstractContextManager["Prefetch[T]"]):
    """An iterator fed by a background thread; made by `prefetch`."""

    def __init__(self, iterable: Iterable[T], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}: it must be at least 1")
        self._channel: _Channel[T] = _Channel(depth)
        self._finalizer = weakref.finalize(self, self._channel.stop)
        self._thread = threading.Thread(target=self._channel.produce, args=(iterable,), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        channel = self._channel
        with channel.changed:
            channel.changed.wait_for(lambda: channel.items or channel.finished or channel.stopped)
            if channel.items:
                item = channel.items.popleft()
                channel.changed.notify_all()
                return item
            error, channel.error = channel.error, None
            if channel.stopped or error is None:
                raise StopIteration
        try:
            raise error
        finally:
            # Its traceback holds this frame: leave no cycle.
            del error

    def close(self) -> None:
        """Stop the thread and wait for it: at most as long as the item being made takes. Items made are
        dropped.

        An error the thread had not yet reported is dropped with them. May be called twice.
        """
        self._finalizer()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prefetch(iterable: Iterable[T], depth: int) -> Prefetch[T]:
    """Iterate `iterable` in one background thread, at most `depth` finished items ahead of the consumer.

    An exception of the iterable is raised in the consumer, the same object, after the items before it.
    Leaving early: `close()`, `with`, or losing the last reference stops the thread and closes the iterable.
    With reused buffers, `depth` + 2 items exist at once: one being made, `depth` waiting, one in use.
    ValueError: depth < 1.
    """
    return Prefetch(iterable, depth)
