"""`budget`: every regime gets the most epochs that keep within what it may spend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planning import CIFAR, plan_of, small_config

from cache_store.errors import ConfigError
from orchestrator.config.schema import Config
from orchestrator.plan.budget import Settled, settle
from orchestrator.plan.experiment import rows_of
from orchestrator.plan.graph import Plan
from workers.specs.as_json import from_json
from workers.specs.tasks import StageTask

REGIMES = {"e2e": {"training": {"epochs": 40}}, "lw": {}, "segprop": {}}


def settled(tmp_path: Path, budget: dict[str, Any], **changes: Any) -> tuple[Config, Settled, Plan]:
    config = small_config(tmp_path, {"budget": budget, "regimes": REGIMES, **changes})
    found = settle(config, plan_of, rows_of(config, CIFAR).train)
    return config, found, plan_of(found.config)


def epochs(plan: Plan, regime: str) -> set[int]:
    return {from_json(StageTask, plan.node(node).task).train.epochs for node in plan.regimes[regime].stages}


def flops(plan: Plan, regime: str) -> int:
    return sum(
        node.estimate.flops for node in plan.nodes if regime in node.regimes and node.kind in ("train", "materialize")
    )


@pytest.mark.parametrize("amount", ["e2e", 5e15], ids=["of a regime", "a number"])
def test_operations_are_spent_up_to_the_last_whole_epoch(tmp_path: Path, amount: float | str) -> None:
    config, found, plan = settled(tmp_path, {"flops": amount})
    most = flops(plan, "e2e") if amount == "e2e" else float(amount)
    if amount == "e2e":
        assert epochs(plan, "e2e") == {40}, "the regime that gives the budget keeps its epochs"
    for name in ("lw", "segprop"):
        (own,) = epochs(plan, name)
        assert flops(plan, name) <= most < flops(plan_of(found.config.with_epochs({name: own + 1})), name)
        assert found.notes[name].startswith(f"epochs a stage by the budget: {own}, for ")
    assert not found.findings
    assert plan_of(config).regimes["segprop"].stages != plan.regimes["segprop"].stages


@pytest.mark.parametrize(
    ("budget", "of"),
    [({"samples": "e2e"}, lambda e2e, stages: e2e // stages), ({"updates": "e2e"}, lambda e2e, stages: e2e // stages)],
    ids=["samples", "updates"],
)
def test_equal_samples_are_shared_by_the_stages(
    tmp_path: Path, budget: dict[str, Any], of: Callable[[int, int], int]
) -> None:
    _, _, plan = settled(tmp_path, budget)
    for name in ("lw", "segprop"):
        assert epochs(plan, name) == {of(40, len(plan.regimes[name].stages))}


def test_stages_with_epochs_of_their_own_keep_them(tmp_path: Path) -> None:
    own = {"kind": "segprop", "stages": {"base": {"epochs": 10}}}
    _, _, plan = settled(tmp_path, {"samples": "e2e"}, regimes={"e2e": REGIMES["e2e"], "segprop": own})
    first, *others = (
        from_json(StageTask, plan.node(node).task).train.epochs for node in plan.regimes["segprop"].stages
    )
    assert first == 10
    assert set(others) == {(40 - 10) // len(others)}


def test_a_step_limit_ends_the_search(tmp_path: Path) -> None:
    _, found, plan = settled(tmp_path, {"updates": 1e6}, **{"training.exit": {"steps": 100}})
    assert not found.findings
    assert epochs(plan, "segprop") == {1}, "an epoch has more steps than a stage may take"


def test_seconds_may_be_a_text(tmp_path: Path) -> None:
    _, _, plan = settled(tmp_path, {"seconds": "10h"})
    for name in REGIMES:
        spent = sum(node.estimate.seconds for node in plan.nodes if name in node.regimes and node.kind != "evaluate")
        assert 0.7 * 36_000 < spent <= 36_100


def test_a_budget_of_less_than_an_epoch_a_stage_is_refused_with_what_that_takes(tmp_path: Path) -> None:
    _, found, _ = settled(tmp_path, {"samples": 150_000}, regimes={"segprop": {}, "e2e": {}})
    ((at, message),) = found.findings
    assert at == ("budget", "samples")
    assert message == "150.00 k samples: segprop takes 180.00 k samples with one epoch a stage"


@pytest.mark.parametrize("measure", ["flops", "seconds"])
def test_the_budget_of_an_unknown_regime_is_refused(tmp_path: Path, measure: str) -> None:
    _, found, _ = settled(tmp_path, {measure: "e2"})
    ((at, message),) = found.findings
    assert at == ("budget", measure)
    assert "e2: is no regime; did you mean 'e2e'?; allowed: a number, or one of e2e, lw, segprop" in message


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "must be exactly one of flops, seconds, samples, updates"),
        ({"flops": 1e12, "samples": 5}, "must be exactly one of"),
        ({"flop": 1e12}, "did you mean flops"),
        ({"flops": -1}, "budget.flops"),
    ],
    ids=["nothing", "two", "misspelt", "negative"],
)
def test_a_wrong_budget_is_refused(tmp_path: Path, budget: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(tmp_path, {"budget": budget, "regimes": REGIMES})
