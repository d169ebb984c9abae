"""Which units of the chain make which segment: the `segments` setting resolved against the real units."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from cache_store.errors import ConfigError
from cache_store.suggest import nearest

Segments = Literal["stages", "blocks"] | tuple[tuple[str, ...], ...]

#: What people call the parts of a head.
_HEAD_NAMES = ("fc", "classifier", "head", "avgpool")


def group(segments: Segments, units: Sequence[str], head_units: Sequence[str]) -> list[list[str]]:
    """The units of every segment, in order.

    units: what lies before the head's cut, in order: "stem", "layer1.0", … ; the last one may be cut. "layer1" names
    the stage; a unit without a stage belongs to the first one.
    head_units: units that lie wholly in the head (only for messages).
    ConfigError lists every unit that is unknown, in the head, named twice, missing or out of order.
    """
    if segments == "stages":
        return _with_stem(_by_stage, units)
    if segments == "blocks":
        return _with_stem(lambda rest: [[unit] for unit in rest], units)
    if isinstance(segments, str):
        raise _error(f"{segments!r} is not known; allowed: stages, blocks or lists of units", segments)
    return _explicit(segments, units, head_units)


def with_units(segments: Segments, units: Iterable[str]) -> Segments:
    """Return lists with those of `units` in the last one that none of them names, by itself or by its stage."""
    if isinstance(segments, str) or not segments:
        return segments
    listed = {name for names in segments for name in names}
    missing = tuple(unit for unit in units if not listed & {unit, _stage(unit)})
    *others, last = segments
    return (*others, (*last, *missing))


def _with_stem(parted: Callable[[list[str]], list[list[str]]], units: Sequence[str]) -> list[list[str]]:
    stem = [unit for unit in units if "." not in unit]
    first, *others = parted([unit for unit in units if "." in unit])
    return [[*stem, *first], *others]


def _by_stage(units: list[str]) -> list[list[str]]:
    return [list(members) for _, members in itertools.groupby(units, _stage)]


def _stage(unit: str) -> str:
    return unit.partition(".")[0]


def _explicit(
    segments: tuple[tuple[str, ...], ...], units: Sequence[str], head_units: Sequence[str]
) -> list[list[str]]:
    problems: list[str] = []
    if not segments:
        problems.append("no segment given")
    groups: list[list[str]] = []
    for index, names in enumerate(segments, start=1):
        members: list[str] = []
        for name in names:
            members += _expand(name, units, head_units, problems)
        if not names:
            problems.append(f"seg{index} is empty")
        groups.append(members)
    if not problems:
        problems = _coverage(groups, units)
    if problems:
        raise _error("; ".join(problems), [list(names) for names in segments])
    return groups


def _expand(name: str, units: Sequence[str], head_units: Sequence[str], problems: list[str]) -> list[str]:
    """The units that `name` stands for; appends to `problems` when there are none."""
    if name in units:
        return [name]
    members = [unit for unit in units if _stage(unit) == name]
    if not members:
        problems.append(_unknown(name, units, head_units))
    return members


def _unknown(name: str, units: Sequence[str], head_units: Sequence[str]) -> str:
    if name in head_units or name in _HEAD_NAMES:
        return f"{name!r} belongs to the head and is not listed in segments"
    stage, dot, _ = name.partition(".")
    indices = [unit.partition(".")[2] for unit in (*units, *head_units) if unit.startswith(stage + ".")]
    if dot and indices:
        return f"{name!r} not found; {stage} has blocks {indices[0]}-{indices[-1]}"
    known = list(dict.fromkeys([*map(_stage, units), *units]))
    return f"{name!r} not found; {suggestion(name, known)}allowed: {', '.join(known)}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'? " in front of what is allowed, or nothing."""
    close = nearest(name, known)
    return "" if close is None else f"did you mean {close!r}? "


def _coverage(groups: list[list[str]], units: Sequence[str]) -> list[str]:
    """What is wrong with known units: named twice, missing, or (when neither) in another order."""
    homes: dict[str, list[str]] = {}
    for index, members in enumerate(groups, start=1):
        for unit in members:
            homes.setdefault(unit, []).append(f"seg{index}")
    problems = [
        f"{unit!r} is listed {len(where)} times ({', '.join(where)})" for unit, where in homes.items() if len(where) > 1
    ]
    missing = [unit for unit in units if unit not in homes]
    if missing:
        problems.append(f"missing {', '.join(map(repr, missing))}: segments must cover the chain up to the head")
    if not problems:
        problems += _order([unit for members in groups for unit in members], units)
    return problems


def _order(listed: Sequence[str], units: Sequence[str]) -> list[str]:
    for found, expected in zip(listed, units, strict=True):
        if found != expected:
            return [f"{found!r} is out of order: {expected!r} comes first"]
    return []


def _error(message: str, value: object) -> ConfigError:
    return ConfigError(f"model.segments: {message}", where="model.segments", value=value)
