"""Wait for a store that cannot be reached: an outage of minutes is no fault of the tasks that meet it.

A failure that may be the store's is held, and the store is looked at in a thread of its own, since a look may hang as
long as a request. Where the store is there, the failure counts as any other. Where it is away, nothing is submitted
until it is back, and the attempts that met the outage do not count.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from cache_store.errors import SegpropError, StorageDenied, StorageFull, StorageUnavailable, StoreError
from cache_store.storage.base import Storage
from orchestrator.runners.base import Failed
from orchestrator.units import seconds_text

#: Between two looks at a store that is away.
LOOK_S = 2.0

_log = logging.getLogger("segprop.driver")


class Verdict(Enum):
    """What becomes of a held failure: it counts as any other, its attempt does not count, or the wait was too long."""

    COUNTS = "counts"
    FREE = "free"
    GIVEN_UP = "given up"


@dataclass(frozen=True)
class Held:
    """A failure of a node that may be the store's; `machine`: where it ran."""

    node_id: str
    failure: Failed
    machine: str | None


def look_at(storage: Storage) -> str | None:
    """Say why a store cannot be used now; None: it can, or waiting would not help."""
    try:
        return None if storage.is_store() else f"{storage.uri}: the store is not there (is its volume mounted?)"
    except StorageUnavailable as error:
        return error.message
    except SegpropError:
        return None


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="segprop-store-watch", daemon=True).start()


class StoreWatch:
    """Hold failures until it is known whether the store is away, and as long as it is."""

    def __init__(
        self,
        look: Callable[[], str | None],
        deadline_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], None] = _in_thread,
    ) -> None:
        """`look`: why the store cannot be used now, None where it can (`look_at`); `start` runs it."""
        self._look, self._deadline_s, self._clock, self._start = look, deadline_s, clock, start
        self._held: list[Held] = []
        #: Since when the store may be away, and why it is, once that is known.
        self._since = 0.0
        self._reason: str | None = None
        self._looking = False
        self._answer: tuple[str | None] | None = None
        self._next_look = 0.0

    @property
    def holds(self) -> bool:
        """Tell whether something is held: nothing should be submitted, and there is something to wait for."""
        return bool(self._held)

    @property
    def away(self) -> str | None:
        """Why the store cannot be reached, while it is waited for."""
        return self._reason

    def hold(self, held: Held) -> bool:
        """Hold a failure that may be the store's; False: it is another one."""
        error = held.failure.error
        if not isinstance(error, StoreError) or isinstance(error, StorageFull | StorageDenied):
            return False
        if not self._held:
            # What a look that hung until now found is about another outage.
            self._since, self._next_look, self._answer = self._clock(), 0.0, None
        self._held.append(held)
        return True

    def settle(self) -> list[tuple[Held, Verdict]]:
        """Return the failures of which is known by now what becomes of them. Call it again and again."""
        if not self._held:
            return []
        now = self._clock()
        if self._answer is not None:
            (reason,) = self._answer
            self._answer, self._next_look = None, now + LOOK_S
            if reason is None:
                return self._release(Verdict.COUNTS if self._reason is None else Verdict.FREE)
            if self._reason is None:
                limit = seconds_text(self._deadline_s)
                self._say(f"{reason}; waiting for it, at most {limit} (resources.store_deadline_s)")
            self._reason = reason
        if now - self._since >= self._deadline_s:
            return self._release(Verdict.GIVEN_UP)
        if not self._looking and now >= self._next_look:
            self._looking = True
            self._start(self._ask)
        return []

    def _ask(self) -> None:
        reason = self._look()
        self._answer, self._looking = (reason,), False

    def _release(self, verdict: Verdict) -> list[tuple[Held, Verdict]]:
        if verdict is Verdict.FREE:
            self._say(f"the store is back after {seconds_text(self._clock() - self._since)}")
        held, self._held, self._reason = self._held, [], None
        return [(each, verdict) for each in held]

    def _say(self, message: str) -> None:
        _log.warning("%s", message)
