"""Whether a failed node is worth another attempt: a pure decision."""

from __future__ import annotations

from dataclasses import dataclass

from cache_store.errors import CorruptShard, Interrupted, MissingShard, SegpropError
from orchestrator.runners.base import Failed

BACKOFF_S = 1.0
BACKOFF_MAX_S = 30.0


@dataclass(frozen=True)
class Retry:
    after_s: float


@dataclass(frozen=True)
class GiveUp:
    reason: str


def decide(failure: Failed, attempts: int, max_attempts: int) -> Retry | GiveUp:
    """`attempts` counts those made so far, this one included.

    Lost workers, passing storage faults and damaged data (quarantined by then) are tried again with doubling
    waits. Bad input, diverged training and defects are final: they would fail the same way.
    """
    error = failure.error
    reason = error.message if isinstance(error, SegpropError) else f"{type(error).__name__}: {error}"
    if isinstance(error, Interrupted):
        return GiveUp(reason)
    passing = failure.lost or isinstance(error, CorruptShard | MissingShard)
    passing = passing or (isinstance(error, SegpropError) and error.retryable)
    if not passing:
        return GiveUp(reason)
    if attempts >= max_attempts:
        return GiveUp(f"{reason} (after {attempts} attempts)")
    return Retry(min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (attempts - 1)))
