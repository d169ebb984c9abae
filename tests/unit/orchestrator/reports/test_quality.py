"""`orchestrator.reports.quality`: what regimes are judged by, and how much better than the original they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from summaries import bare_regime, bare_stage, bare_summary

from orchestrator.reports.quality import improvements, loss_text, perplexity_text, quality_of
from orchestrator.reports.records import EpochSummary, StageSummary, Summary


def summary(original: dict[str, Any] | None = None, **finals: dict[str, Any]) -> Summary:
    return bare_summary(
        original={"test": original} if original else {},
        regimes={
            name: bare_regime("e2e" if name in ("e2e", "lora") else "segprop", metrics=metrics)
            for name, metrics in finals.items()
        },
    )


LM = {"loss": 2.0, "accuracy": 0.5, "perplexity": 7.39}


def test_classifiers_are_read_by_accuracy_language_models_by_loss_and_questions_by_answers() -> None:
    assert quality_of(summary(e2e={"loss": 0.1, "accuracy": 0.9})).metric == "accuracy"
    assert quality_of(summary(e2e=LM)).metric == "loss"
    task = quality_of(summary(e2e={**LM, "token_accuracy": 0.3}))
    assert (task.metric, task.text, task.task) == ("accuracy", True, True)


def test_a_language_model_is_known_before_its_first_result() -> None:
    def begun(*stages: StageSummary) -> Summary:
        return bare_summary(regimes={"e2e": bare_regime("e2e", stages=stages)})

    assert not quality_of(begun()).text
    assert quality_of(begun(bare_stage(layer=3))).text
    assert quality_of(begun(bare_stage(curve=(EpochSummary(validation=LM),)))).metric == "loss"
    # An image network may be cut at its layers too.
    scored = (EpochSummary(validation={"loss": 0.1, "accuracy": 0.9}),)
    assert quality_of(begun(bare_stage(layer=3, curve=scored))).metric == "accuracy"


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 20), min_size=1), st.booleans())
def test_the_best_is_the_first_of_the_ranking(values: dict[str, float], task: bool) -> None:
    quality = quality_of(summary(e2e={**LM, **({"token_accuracy": 0.3} if task else {})}))
    ranked = quality.ranked(values)
    assert sorted(ranked) == sorted(values)
    assert values[ranked[0]] == quality.best(values.values()) == (max if task else min)(values.values())


def test_improvement_is_a_share_of_the_first_end_to_end_regimes() -> None:
    found = summary(
        {"loss": 3.0, "perplexity": 20.1}, e2e=LM, segprop={**LM, "loss": 2.25}, lora={**LM, "loss": 3.5}, later={}
    )
    gains = improvements(found, quality_of(found))
    assert {name: item.gain for name, item in gains.items()} == {"e2e": 1.0, "segprop": 0.75, "lora": -0.5}
    assert {name: item.share for name, item in gains.items()} == {"e2e": None, "segprop": 0.75, "lora": -0.5}


def test_there_is_no_share_of_an_improvement_that_is_none() -> None:
    worse = summary({"loss": 1.0, "perplexity": 2.7}, e2e=LM, segprop={**LM, "loss": 0.5})
    assert improvements(worse, quality_of(worse))["segprop"].share is None
    assert improvements(summary(e2e=LM), quality_of(summary(e2e=LM))) == {}


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (8.194, "8.19"), (134.2, "134"), (5321.0, "5,321"), (2.1e6, "2.1e+06")]
)
def test_perplexity_has_decimals_where_they_say_something(value: float | None, text: str) -> None:
    assert perplexity_text({"perplexity": value}) == text
    assert loss_text(None) == "–"
