"""Give every regime the epochs that a budget allows.

Pure: plans of trial configurations say what a number of epochs would take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cache_store.suggest import did_you_mean
from orchestrator.costs import formulas
from orchestrator.plan.graph import Plan
from orchestrator.units import human_count, human_flops, human_seconds
from workers.models.base import Finding
from workers.specs.as_json import from_json
from workers.specs.tasks import StageTask

if TYPE_CHECKING:
    from orchestrator.config.schema import Config

#: The most epochs that a configuration may ask for.
MOST_EPOCHS = 1_000_000


@dataclass(frozen=True)
class Settled:
    """A configuration whose regimes keep within the budget, and for each a sentence about it."""

    config: Config
    notes: dict[str, str]
    findings: tuple[Finding, ...] = ()


def spent(plan: Plan, regime: str, measure: str, rows: int) -> float:
    """Return what a regime's training takes of one measure of `BudgetConfig`. `rows`: samples of an epoch."""
    if measure in ("flops", "seconds"):
        nodes = [node for node in plan.nodes if regime in node.regimes and (node.trains or node.makes_set)]
        return float(sum(getattr(node.estimate, measure) for node in nodes))
    stages = [from_json(StageTask, plan.node(stage).task).train for stage in plan.regimes[regime].stages]
    if measure == "updates":
        return float(sum(formulas.steps_to_run(train, rows) for train in stages))
    return float(sum(formulas.epochs_to_run(train, rows) * rows for train in stages))


def settle(config: Config, plan_of: Callable[[Config], Plan], rows: int) -> Settled:
    """Return the configuration with the most epochs for each regime that keep within `budget`. A regime that exceeds it
    with one epoch a stage is a finding, with what it takes."""
    budget = config.budget
    if budget is None:
        return Settled(config, {})
    measure, amount = budget.measure, budget.amount
    at = ("budget", measure)
    if isinstance(amount, str) and amount not in config.regimes:
        words = f"{amount}: is no regime{did_you_mean(amount, config.regimes)}; allowed: a number, or one of "
        return Settled(config, {}, ((at, words + ", ".join(config.regimes)),))

    alone = _share_nothing(config)

    def cost(name: str, epochs: int | None) -> float:
        trial = config if epochs is None else config.with_epochs({name: epochs})
        if alone:
            trial = trial.model_copy(update={"regimes": {name: trial.regimes[name]}})
        return spent(plan_of(trial), name, measure, rows)

    most = cost(amount, None) if isinstance(amount, str) else float(amount)
    epochs, notes, findings = dict[str, int](), dict[str, str](), list[Finding]()
    for name in config.regimes:
        if name == amount:
            continue
        least = cost(name, 1)
        if least > most:
            allowed = f"{_text(measure, most)} of {amount}" if isinstance(amount, str) else _text(measure, most)
            findings.append((at, f"{allowed}: {name} takes {_text(measure, least)} with one epoch a stage"))
            continue
        epochs[name] = _largest(partial(cost, name), most)
        took = _text(measure, cost(name, epochs[name]))
        notes[name] = f"epochs a stage by the budget: {epochs[name]}, for {took} of {_text(measure, most)}"
    return Settled(config.with_epochs(epochs), notes, tuple(findings))


def _share_nothing(config: Config) -> bool:
    """Whether what a regime takes does not depend on the others: all that they may share is room for snapshots."""
    return all(config.regime(name).snapshots.budget is None for name in config.regimes)


def _largest(cost: Callable[[int], float], most: float) -> int:
    """Return the largest number of epochs within `most`; one is. A regime whose stages end by themselves costs no more
    from some number on: that number."""
    low, high = 1, 2
    while high < MOST_EPOCHS and cost(high) <= most:
        if cost(high) == cost(low):
            return low
        low, high = high, high * 2
    high = min(high, MOST_EPOCHS + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= most else (low, middle)
    return low


def _text(measure: str, value: float) -> str:
    if measure == "seconds":
        return human_seconds(value)
    if measure == "flops":
        return f"{human_flops(value)}FLOP"
    return f"{human_count(round(value))} {measure}"
