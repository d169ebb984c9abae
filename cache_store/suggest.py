"""The known name that a wrong one is closest to, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`, or None when none is as alike as `cutoff` (0..1)."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` to append to a message, or nothing when no known name is close."""
    close = nearest(name, known, cutoff)
    return "" if close is None else f"; did you mean {close!r}?"
