"""Turn stages into overlapping rounds: what runs when, and on whose weights. Pure data, like `stages`.

Every stage's epochs are cut into the same number of rounds. Round `t` of stage `s` runs at time `s + t` of the wave:
a stage starts one round after the stage before it, and from then on they train side by side, all rounds of one time
independent of each other. What a round stands on:

- its own segment: where its round before left it, optimizer and all;
- the prefix `F[0:d]` it reads through a boundary: round `t` of every segment before it. That is what rolling forward
  gives: the segment before trained on these very samples in its round `t`, one time earlier, so one hop over stored
  rows makes the boundary, and every hop of a time can run beside the others. The last round of every stage therefore
  trains on the finished prefix;
- frozen blocks between it and the global head: the newest version there is;
- the global head, of which every segment in training has a replica: the mean of the replicas where the time before
  ended with an average, else its own replica; the first round of a stage without an average to start from takes the
  replica of the stage before it.

Then the last stage trains once more, alone, on the prefix as it ended (`final`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.regimes.stages import Stage

#: Name and group of the pass after the last round.
FINAL: Literal["final"] = "final"


@dataclass(frozen=True)
class Round:
    """One train node. `weights`: part -> key of the step whose commit holds it; a part not named there has its initial
    weights."""

    key: str
    stage: Stage
    #: Which round of its stage, and when in the wave; counted from 0.
    index: int
    time: int
    #: Epochs of the stage that it trains; None: all of a stage that is not cut.
    epochs: tuple[int, int] | None
    weights: Mapping[str, str]
    #: The round before.
    continues: str | None = None
    #: Where the head's optimizer state comes from, if that is carried from stage to stage.
    previous: str | None = None


@dataclass(frozen=True)
class Average:
    """The mean of the global head's parts over the rounds of one time."""

    key: str
    time: int
    parts: tuple[str, ...]
    replicas: tuple[str, ...]


@dataclass(frozen=True)
class StageEnd:
    """A stage's last round is over. `weights`: the network as it is then; parts as in `Round.weights`."""

    stage: Stage
    rounds: tuple[str, ...]
    weights: Mapping[str, str]


Step = Round | Average | StageEnd


def final_stage(stages: Sequence[Stage]) -> Stage:
    """Return the pass over the finished prefix: the last stage once more."""
    last = stages[-1]
    return Stage(FINAL, FINAL, last.hops, last.path, last.trained, last.adapter)


def steps(stages: Sequence[Stage], epochs: Mapping[str, int], *, rounds: int, average_every: int) -> tuple[Step, ...]:
    """Return the steps of a regime, each after all it needs. `stages`: with the final pass at its end, if there is one;
    `epochs`: of every stage by name, at least `rounds`."""
    final = stages[-1] if stages[-1].group == FINAL else None
    return _Wave(stages if final is None else stages[:-1], epochs, rounds, average_every).steps(final)


@dataclass
class _Wave:
    stages: Sequence[Stage]
    epochs: Mapping[str, int]
    rounds: int
    average_every: int
    averages: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        trained = [set(stage.trained) for stage in self.stages]
        shared = set.intersection(*trained)
        #: Parts of the global head, in order.
        self.head = tuple(part for part in self.stages[-1].trained if part in shared)
        #: Block -> which stage trains it.
        self.owner = {
            part: number for number, stage in enumerate(self.stages) for part in stage.trained if part not in shared
        }

    def steps(self, final: Stage | None) -> tuple[Step, ...]:
        found: list[Step] = []
        last = len(self.stages) - 1
        for time in range(self.rounds + last):
            running = [number for number in range(last + 1) if 0 <= time - number < self.rounds]
            found += [self._round(number, time) for number in running]
            if len(running) > 1 and (time + 1) % self.average_every == 0:
                replicas = tuple(_key(number, time - number) for number in running)
                found.append(Average(_average(time), time, self.head, replicas))
                self.averages.add(time)
            if running[0] == time - self.rounds + 1:
                found.append(self._end(running[0], time))
        if final is not None:
            ended = self._ended(last + self.rounds - 1)
            weights = {part: ended[part] for part in (*_hop_blocks(final), *final.path) if part in ended}
            step = Round(
                FINAL, final, self.rounds - 1, last + self.rounds, None, weights, previous=_key(last, self.rounds - 1)
            )
            found.append(step)
            found.append(StageEnd(final, (FINAL,), ended | dict.fromkeys(final.trained, FINAL)))
        return tuple(found)

    def _round(self, number: int, time: int) -> Round:
        stage, index = self.stages[number], time - number
        weights: dict[str, str] = {}
        for part in (*_hop_blocks(stage), *stage.path):
            owner = self.owner.get(part)
            if owner is None:
                continue
            # Before it: the same round. Its own: the round before. Behind it: whatever there is.
            version = index if owner < number else time - 1 - owner
            if version >= 0:
                weights[part] = _key(owner, version)
        head = self._head(number, time)
        if head is not None:
            weights |= dict.fromkeys(self.head, head)
        total = self.epochs[stage.name]
        bounds = (total * index // self.rounds, total * (index + 1) // self.rounds)
        before = _key(number, index - 1) if index else None
        previous = _key(number - 1, 0) if number and not index else None
        return Round(_key(number, index), stage, index, time, bounds, weights, before, previous)

    def _head(self, number: int, time: int) -> str | None:
        if time - 1 in self.averages:
            return _average(time - 1)
        if time > number:
            return _key(number, time - number - 1)
        return _key(number - 1, 0) if number else None

    def _end(self, number: int, time: int) -> StageEnd:
        keys = tuple(_key(number, index) for index in range(self.rounds))
        return StageEnd(self.stages[number], keys, self._ended(time))

    def _ended(self, time: int) -> dict[str, str]:
        """Return the network when the rounds of `time` are over: every block as new as it is, and the head's mean."""
        weights = {}
        for part, owner in self.owner.items():
            version = min(time - owner, self.rounds - 1)
            if version >= 0:
                weights[part] = _key(owner, version)
        first = max(0, time - self.rounds + 1)
        head = _average(time) if time in self.averages else _key(first, time - first)
        return weights | dict.fromkeys(self.head, head)


def _hop_blocks(stage: Stage) -> tuple[str, ...]:
    return tuple(block for hop in stage.hops for block in hop)


def _key(stage: int, index: int) -> str:
    return f"stage {stage} round {index}"


def _average(time: int) -> str:
    return f"average {time}"
