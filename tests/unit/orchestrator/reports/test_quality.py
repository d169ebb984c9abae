"""`orchestrator.reports.quality`: what regimes are judged by, and how much better than the original they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from summaries import bare_regime, bare_stage, bare_summary

from orchestrator.reports.quality import improvements, loss_text, perplexity_text, quality_of
from orchestrator.reports.records import EpochSummary, StageSummary, Summary
from orchestrator.reports.verdict import verdict


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


@pytest.mark.parametrize(
    ("metrics", "metric", "words", "ranking"),
    [
        (
            [{"f1_micro": 0.9, "f1_macro": 0.1, "loss": 0.5}, {"f1_micro": 0.95, "f1_macro": 0.2, "loss": 0.6}],
            "f1_micro",
            "95.00 %",
            "LW has the highest test F1 (micro), 95.00 %; End-to-end 90.00 % (−5.00 points).",
        ),
        (
            [{"r2": -0.5, "rmse": 2.0, "mae": 1.0, "loss": 4.0}, {"r2": 0.25, "rmse": 1.0, "mae": 0.5, "loss": 1.0}],
            "r2",
            "0.2500",
            "LW has the highest test R², 0.2500; End-to-end −0.5000 (−0.7500).",
        ),
        (
            [{"loss": 4.0}, {"loss": 1.0}],
            "loss",
            "1.0000",
            "LW has the lowest test loss, 1.0000; End-to-end 4.0000 (+3.0000).",
        ),
    ],
)
def test_networks_of_other_targets_are_read_by_f1_by_r2_or_by_their_loss(
    metrics: list[dict[str, Any]], metric: str, words: str, ranking: str
) -> None:
    found = bare_summary(
        regimes={name: bare_regime(name, metrics=own) for name, own in zip(("e2e", "lw"), metrics, strict=True)}
    )
    quality = quality_of(found)
    assert (quality.metric, quality.text, quality.perplexed) == (metric, False, False)
    assert quality.written(quality.best(quality.value(own) for own in metrics)) == words
    sentences = verdict(found)
    assert sentences[0].replace("Layer-wise", "LW") == ranking
    # How many samples there are says nothing of the noise of these.
    assert not any("noise is" in sentence or "is noise" in sentence for sentence in sentences)


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
