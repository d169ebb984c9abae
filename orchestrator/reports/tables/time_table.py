"""Say where the time of stages went: phases in words, shares of the whole, and rows for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from orchestrator.reports.part_names import rows_of_layers
from orchestrator.reports.records import RegimeSummary
from orchestrator.units import DASH, percent_text, seconds_text
from workers.specs.results import TimeSpent

#: Phase -> what to call it.
WORDS: Mapping[str, str] = {
    "opening": "hand-over: reading weights, building",
    "data": "waiting for data",
    "copies": "copies and casts of batches",
    "prefix": "forward, frozen blocks before the stage",
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "update": "update",
    "checkpoints": "checkpoints, best weights",
    "validation": "validation",
    "test": "scoring the test split",
    "measuring": "measuring and reporting",
    "publishing": "hand-over: writing the weights",
    "rest": "everything else",
}
#: Smaller shares have no part in a bar.
LEAST_SHOWN = 0.002


@dataclass(frozen=True)
class Group:
    """Phases that one column shows together. `colour`: of its part of a bar."""

    title: str
    colour: str
    phases: tuple[str, ...]


GROUPS = (
    Group("Data", "#c98a1b", ("data", "copies")),
    Group("Frozen forward", "#8fb4e3", ("prefix",)),
    Group("Forward", "#3b6fb6", ("forward",)),
    Group("Loss", "#6d5bb3", ("loss",)),
    Group("Backward", "#1d3f73", ("backward",)),
    Group("Update", "#0e8a6d", ("update",)),
    Group("Validation", "#8fc7a9", ("validation", "test")),
    Group("Checkpoints", "#b5527d", ("checkpoints",)),
    Group("Hand-over", "#c0392b", ("opening", "publishing")),
    Group("Measuring, rest", "#8a96a3", ("measuring", "rest")),
)


def share(times: TimeSpent, *phases: str) -> float:
    """Return the share of the time on the clock that some phases took, 0 to 1."""
    return sum(times.phases.get(phase, 0.0) for phase in phases) / times.seconds if times.seconds > 0 else 0.0


def cores(seconds: float | None, processor: float | None) -> str:
    """Write how many cores were busy on average."""
    return f"{processor / seconds:.2f}" if seconds and processor is not None else DASH


def shown_groups(regimes: Mapping[str, RegimeSummary]) -> list[Group]:
    """List the groups in which any stage spent time; none where no stage says where its time went."""
    known = [stage.times for regime in regimes.values() for stage in regime.stages if stage.times is not None]
    return [group for group in GROUPS if any(share(times, *group.phases) > 0 for times in known)]


@dataclass(frozen=True)
class BarPart:
    """A part of a bar: its width in percent, its colour, and what it stands for."""

    width: str
    colour: str
    words: str


@dataclass(frozen=True)
class TimeRow:
    """One stage in the report, in words. `shares`: by title of group; `parts`: of the forward pass."""

    regime: str
    first: bool
    colour: str
    stage: str
    seconds: str
    cores: str
    shares: Mapping[str, str]
    bar: Sequence[BarPart]
    parts: str


def time_rows(name: str, regime: RegimeSummary, colour: str) -> list[TimeRow]:
    """Return a row of the report for each stage of a regime that says where its time went, and one for all of them
    where there are several. `name`: of the regime, as people read it."""
    known = [(stage.name, stage.times) for stage in regime.stages if stage.times is not None]
    if len(known) > 1:
        # Parts of different stages are not parts of one forward pass.
        known.append(("together", replace(reduce(add, (times for _, times in known)), forward={})))
    return [_row(name, index == 0, colour, stage, times) for index, (stage, times) in enumerate(known)]


def _row(regime: str, first: bool, colour: str, stage: str, times: TimeSpent) -> TimeRow:
    shares = {group.title: share(times, *group.phases) for group in GROUPS}
    return TimeRow(
        regime,
        first,
        colour,
        stage,
        seconds=seconds_text(times.seconds),
        cores=cores(times.seconds, times.processor_seconds),
        shares={title: percent_text(value) if value else DASH for title, value in shares.items()},
        bar=[
            BarPart(f"{100 * shares[group.title]:.2f}", group.colour, bar_words(group, times))
            for group in GROUPS
            if shares[group.title] >= LEAST_SHOWN
        ],
        parts=", ".join(f"{part} {percent_text(value)}" for part, value in part_shares(times).items()),
    )


def bar_words(group: Group, times: TimeSpent) -> str:
    """Say what a part of a bar stands for."""
    taken = [(WORDS[phase], times.phases[phase]) for phase in group.phases if phase in times.phases]
    return "; ".join(f"{words}: {seconds_text(seconds)}" for words, seconds in taken)


def part_shares(times: TimeSpent) -> dict[str, float]:
    """Return the share of the forward pass that each part took, layers in a row together; {} where it was not
    divided."""
    whole, found = times.phases.get("forward", 0.0), dict[str, float]()
    if not whole:
        return found
    for names in rows_of_layers(list(times.forward)):
        title = names[0] if len(names) == 1 else f"{names[0]}–{names[-1]}"
        found[title] = sum(times.forward[name] for name in names) / whole
    return found
