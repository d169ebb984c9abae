"""How long and how often a network call is tried. Pure but for the environment it is read from."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cache_store.errors import UserError


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` tries, waiting `first_wait_s`, twice that, … up to `longest_wait_s` in between (each shortened
    at random to as little as half, so that many workers do not come back at once). One request ends after
    `request_s`, whatever the server does; no new try begins after `total_s`."""

    attempts: int = 6
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    request_s: float = 60.0
    total_s: float = 180.0

    def waits(self, draw: Callable[[], float] = random.random) -> Iterator[float]:
        """Yield the seconds to wait after each failed try but the last. `draw`: uniform in [0, 1)."""
        for n in range(self.attempts - 1):
            # The exponent is bounded: 2.0**1100 overflows.
            yield min(self.first_wait_s * 2.0 ** min(n, 60), self.longest_wait_s) * (0.5 + draw() / 2)

    @classmethod
    def from_environment(cls) -> RetryPolicy:
        """Return the defaults, with SEGPROP_STORE_ATTEMPTS and SEGPROP_STORE_REQUEST_S where set. UserError when these
        are not positive numbers."""
        attempts = _number("SEGPROP_STORE_ATTEMPTS", cls.attempts, 100)
        request_s = _number("SEGPROP_STORE_REQUEST_S", cls.request_s, 3600)
        return cls(attempts=max(1, int(attempts)), request_s=request_s)


def _number(name: str, default: float, most: float) -> float:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise UserError(f"{name}={text!r}: must be a number above 0, at most {most:g}")
    return value
