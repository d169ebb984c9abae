"""Define what the live page shows of a run, as plain frozen values: the page lays them out, `/api/run` writes them as
JSON. None, or an empty text, stands for what is not known. Times are unix seconds by the store's clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: States of a part: what the graph of stages is coloured by.
WAITING, RUNNING, STORED, REUSED, RELEASED, FAILED, STOPPED = (
    *("waiting", "running", "stored", "reused", "released", "failed", "stopped"),
)


@dataclass(frozen=True)
class Part:
    """A box of the graph: a stage, or the snapshot sets (or scores) that stand between two stages.

    `done` of `total` tasks are committed. `share`: of the running one, 0..1. `words`: its latest progress, or why it
    failed. `facts`: pairs of name and figure."""

    label: str
    stage: bool
    state: str
    done: int
    total: int
    share: float | None
    words: str
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RegimeView:
    """A regime: its parts in the order in which they are needed, and what its final model came to."""

    name: str
    #: An index into the page's palette.
    colour: int
    words: str
    state: str
    validation: str
    test: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class StageMemory:
    """What a stage takes, in bytes, and what it reads of snapshots. While it runs, what it has told so far."""

    regime: str
    stage: str
    state: str
    predicted_bytes: int | None
    device_bytes: int | None
    host_bytes: int | None
    hits: int | None
    misses: int | None
    bytes_read: int | None
    bytes_written: int | None
    trainable: int | None


@dataclass(frozen=True)
class Line:
    """A curve's points (optimizer steps of the regime, value) of one stage. `colour`: index of the regime."""

    regime: str
    stage: str
    colour: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Curve:
    """A figure over optimizer steps."""

    figure: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class LogLine:
    """A line of the log: `when` as it was written (UTC); `stage` is empty where it is about none."""

    when: str
    level: str
    stage: str
    text: str


@dataclass(frozen=True)
class StopOffer:
    """Whether the driver can be asked to stop from here. `driver`: which, by its number; `words`: who it is, or why
    not."""

    possible: bool
    driver: int | None
    words: str


@dataclass(frozen=True)
class RunView:
    """One run at one moment. `path` is relative to the folder that the page shows. `seen`: the driver's last sign of
    life; `files`: results that lie in its directory."""

    path: str
    run: str
    state: str
    state_words: str
    store: str
    driver: str
    seen: float | None
    counts: Mapping[str, int]
    snapshot_bytes: int
    preparation: tuple[Part, ...]
    regimes: tuple[RegimeView, ...]
    beside: tuple[tuple[str, str], ...]
    memory: tuple[StageMemory, ...]
    curves: tuple[Curve, ...]
    log: tuple[LogLine, ...]
    data: tuple[str, ...]
    warnings: tuple[str, ...]
    failures: Mapping[str, str]
    files: tuple[str, ...]
    stop: StopOffer


@dataclass(frozen=True)
class SweepTable:
    """The trials of a sweep as rows of texts under `heads`; the first cell is the trial's name, which `paths` leads to.
    `shown` of `total` rows passed the filter."""

    metric: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    paths: tuple[str | None, ...]
    best: tuple[bool, ...]
    total: int

    @property
    def shown(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class ListedView:
    """A line of the list of runs. `reason`: why its state is not known. `trial`: it belongs to the sweep above it."""

    path: str
    state: str
    state_words: str
    reason: str
    done: int
    total: int
    bytes: int
    store_bytes: int
    seen: float | None
    scores: Mapping[str, str]
    sweep: bool
    trial: bool
