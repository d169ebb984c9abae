"""`orchestrator.reports.figures.layer_curve` and its figure: score against layer index, from `summary.json` alone."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_summary
from hypothesis import given
from hypothesis import strategies as st
from summaries import bare_regime, bare_stage, bare_summary, read

from orchestrator.reports.figures.layer_curve import layer_curve
from orchestrator.reports.page import render
from orchestrator.reports.records import RegimeSummary, StageSummary


def stage(layer: Any, truncated: Any = None, full: Any = None) -> StageSummary:
    return bare_stage(layer=layer, truncated=truncated or {}, full=full or {})


def regime(kind: str, *stages: StageSummary, validation: dict[str, float] | None = None) -> RegimeSummary:
    return bare_regime(kind, stages=stages, validation=validation or {})


def scores(loss: float | None, accuracy: float | None = None) -> dict[str, Any]:
    return {"loss": loss, "accuracy": accuracy}


SUMMARY = bare_summary(
    original={"test": scores(9.9, 0.0), "validation": scores(2.8, 0.4)},
    regimes={
        "e2e": regime("e2e", stage(None, full=scores(2.7, 0.5)), validation=scores(2.71, 0.49)),
        "segprop": regime(
            "segprop",
            stage(19, scores(10.0, 0.1), scores(9.0, 0.2)),
            stage(20, scores(5.0, 0.3), scores(4.0)),
            stage("head", None, scores(2.6, 0.6)),
        ),
    },
)


def test_layers_stand_at_their_number_and_the_lm_head_last() -> None:
    curve = layer_curve(SUMMARY)
    assert curve is not None
    assert curve.ticks == ((19, "19"), (20, "20"), (21, "LM head"))
    assert [(line.regime, line.model, line.points) for line in curve.lines["loss"]] == [
        ("segprop", "truncated", ((19, 10.0), (20, 5.0))),
        ("segprop", "full", ((19, 9.0), (20, 4.0), (21, 2.6))),
    ]
    assert [line.points for line in curve.lines["accuracy"]] == [((19, 0.1), (20, 0.3)), ((19, 0.2), (21, 0.6))]


def test_original_and_e2e_stand_across() -> None:
    curve = layer_curve(SUMMARY)
    assert curve is not None
    assert curve.across == {"loss": ((None, 2.8), ("e2e", 2.7)), "accuracy": ((None, 0.4), ("e2e", 0.5))}
    e2e = replace(SUMMARY.regimes["e2e"], stages=(stage(None),))
    curve = layer_curve(replace(SUMMARY, original={}, regimes={**SUMMARY.regimes, "e2e": e2e}))
    assert curve is not None
    assert curve.across["loss"] == (("e2e", 2.71),)


def test_a_layer_that_is_finished_twice_counts_as_it_was_left() -> None:
    twice = regime("segprop", stage(3, None, scores(2.0)), stage(3, None, scores(1.0)))
    curve = layer_curve(bare_summary(regimes={"a": twice}))
    assert curve is not None
    assert curve.lines["loss"][0].points == ((3, 1.0),)


@pytest.mark.parametrize(
    "stages",
    [
        [],
        [stage(None)],
        [stage(None, scores(1.0))],
        [stage(3)],
        [stage(3, {}, scores(None))],
    ],
)
def test_without_a_judged_layer_there_is_no_curve(stages: list[StageSummary]) -> None:
    assert layer_curve(bare_summary(regimes={"a": regime("segprop", *stages)})) is None
    assert layer_curve(bare_summary(regimes={"a": regime("e2e", stage(3, scores(1.0)))})) is None


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.just("head"), st.integers(0, 40)),
            st.one_of(st.none(), st.floats(0, 20)),
            st.one_of(st.none(), st.floats(0, 20)),
        ),
        max_size=12,
    )
)
def test_every_point_has_a_tick_and_layers_only_rise(stages: list[tuple[Any, Any, Any]]) -> None:
    made = [stage(layer, scores(first), scores(second)) for layer, first, second in stages]
    curve = layer_curve(bare_summary(regimes={"a": regime("segprop", *made)}))
    wanted = {layer for layer, first, second in stages if layer is not None and (first, second) != (None, None)}
    if curve is None:
        assert not wanted
        return
    positions = [position for position, _ in curve.ticks]
    assert positions == sorted(set(positions))
    assert len(positions) == len(wanted)
    assert ("head" in wanted) == (curve.ticks[-1][1] == "LM head")
    for line in curve.lines["loss"]:
        assert [position for position, _ in line.points] == sorted({position for position, _ in line.points})
        assert {position for position, _ in line.points} <= set(positions)


@pytest.fixture(scope="module")
def lm_summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run as of a language model: its stages judged by layer."""
    summary = make_summary(tmp_path_factory.mktemp("summary"), regimes="[e2e, segprop]", epochs=2)
    summary["original"] = {"validation": scores(2.8, 0.4), "test": {}}
    summary["regimes"]["e2e"]["stages"][-1]["full"] = scores(2.7, 0.5)
    pattern = summary["regimes"]["segprop"]["stages"][0]
    judged = [*((layer, 12.0 - layer / 3) for layer in range(1, 29)), ("head", 2.5)]
    summary["regimes"]["segprop"]["stages"] = [
        {**copy.deepcopy(pattern), "layer": layer, "truncated": scores(loss, 0.2), "full": scores(loss / 2, 0.3)}
        for layer, loss in judged
    ]
    return summary


def test_the_report_draws_every_judged_layer_once(lm_summary: dict[str, Any]) -> None:
    page = render(read(json.loads(json.dumps(lm_summary))))
    assert "Layer by layer" in page
    for metric in ("loss", "accuracy"):
        for model in ("truncated", "full"):
            found = re.search(rf'<g id="layers-segprop-{model}-{metric}">\s*<path d="([^"]*)"', page)
            assert found is not None
            assert len(re.findall(r"[ML] ", found.group(1))) == 29
        for index in range(2):  # the original, E2E
            assert f'id="layers-across-{index}-{metric}"' in page
    [figure] = re.findall(r'<svg[^>]*aria-label="Score against layer index".*?</svg>', page, flags=re.DOTALL)
    ElementTree.fromstring(figure)
    assert figure.count("LM head") >= 2
    assert "SegProp, cut off behind the layer" in page


def test_the_report_draws_what_is_there_and_nothing_without_it(lm_summary: dict[str, Any], tmp_path: Path) -> None:
    losses_only = copy.deepcopy(lm_summary)
    for one in losses_only["regimes"]["segprop"]["stages"]:
        one["full"]["accuracy"] = one["truncated"]["accuracy"] = None
    page = render(read(losses_only))
    assert 'id="layers-segprop-full-loss"' in page
    assert 'id="layers-segprop-full-accuracy"' not in page
    assert "Layer by layer" not in render(read(make_summary(tmp_path, epochs=2)))


def test_a_single_layer_is_drawn(lm_summary: dict[str, Any]) -> None:
    one = copy.deepcopy(lm_summary)
    one["regimes"]["segprop"]["stages"] = one["regimes"]["segprop"]["stages"][:1]
    assert 'id="layers-segprop-full-loss"' in render(read(one))
