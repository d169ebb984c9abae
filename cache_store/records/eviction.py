"""Choose which copies on this machine's disk make room for a new one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Copies used this recently are never evicted: their user may be about to map them.
GRACE_S = 60.0


@dataclass(frozen=True)
class Copy:
    """One copy: its name, length, when it was last used (seconds), and whether it is still being written."""

    name: str
    bytes: int
    used: float
    unfinished: bool = False


def victims(copies: Sequence[Copy], needed: int, limit: int, now: float) -> list[str] | None:
    """Name the copies to delete, least recently used first, so that `needed` more bytes stay within `limit`.

    None when that cannot be: `needed` alone is too much, or what is in use or being written takes the room. Never
    more copies than it takes.
    """
    total = sum(copy.bytes for copy in copies)
    chosen: list[str] = []
    if needed > limit:
        return None
    for copy in sorted(copies, key=lambda copy: (copy.used, copy.name)):
        if total + needed <= limit:
            break
        if copy.unfinished or copy.used > now - GRACE_S:
            continue
        chosen.append(copy.name)
        total -= copy.bytes
    return chosen if total + needed <= limit else None


def default_limit(free: int, held: int) -> int:
    """Compute the bytes that copies may take when nothing is set: half of what they and the disk's free space make
    together."""
    return (free + held) // 2
