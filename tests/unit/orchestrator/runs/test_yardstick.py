"""Which regime the others are compared with, and that results say what was trained."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from planning import small_config
from summaries import bare_regime, bare_summary

from cache_store.errors import ConfigError
from orchestrator.config.regimes import yardstick_of
from orchestrator.reports.page import render
from orchestrator.reports.records import About
from orchestrator.reports.summary import settings_of
from orchestrator.reports.tables.result_table import print_table

LORA: dict[str, Any] = {"kind": "e2e", "training": {"batch_size": 8}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"regimes": {"short": LORA, "segprop": {}, "e2e": {}}}, "e2e"),
        ({"regimes": {"short": LORA, "whole": {"kind": "e2e"}}}, "whole"),
        ({"regimes": {"short": LORA, "segprop": {}}}, "short"),
        ({"regimes": {"short": LORA, "longer": {"kind": "e2e", "training": {"epochs": 9}}}}, "longer"),
        ({"regimes": ["segprop"]}, None),
        ({"regimes": {"short": LORA, "e2e": {}}, "evaluation.yardstick": "short"}, "short"),
    ],
)
def test_the_plain_end_to_end_regime_is_the_yardstick_unless_another_is_named(
    changes: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    assert yardstick_of(small_config(tmp_path, changes)) == expected


def test_a_yardstick_that_is_no_regime_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.yardstick: segprob: no such regime; did you mean 'segprop'"):
        small_config(tmp_path, {"regimes": ["e2e", "segprop"], "evaluation.yardstick": "segprob"})


def regimes() -> dict[str, Any]:
    def one(kind: str, seconds: float) -> Any:
        return bare_regime(kind, seconds=seconds, settings={"learning rate": "0.001"})

    return {"lora": one("e2e", 10.0), "e2e": one("e2e", 40.0), "segprop": one("segprop", 20.0)}


def test_the_table_compares_with_the_yardstick_and_names_it() -> None:
    about = About("resnet18", "digits: 96 images", 0, "e2e")
    out = StringIO()
    print_table(bare_summary(regimes=regimes(), about=about), out)
    assert "0.50×" in out.getvalue().splitlines()[3]
    other = StringIO()
    print_table(bare_summary(regimes=regimes(), about=About("m", "d", 0, "lora")), other)
    assert "of lora" in other.getvalue().splitlines()[0]
    assert "2.00×" in other.getvalue().splitlines()[3]


def test_the_report_says_what_was_trained_and_links_what_lies_beside_it() -> None:
    about = About("resnet18 <small>", "digits: 96 images", 7, "e2e")
    page = render(bare_summary(regimes=regimes(), about=about))
    for text in ("resnet18 &lt;small&gt;", "digits: 96 images", "Learning rate", "0.001", 'href="config.yaml"'):
        assert text in page


def test_settings_name_each_value_once_in_order() -> None:
    first = {"optimizer": {"name": "adamw", "lr": 1e-3}, "batch_size": 16, "epochs": 2, "lora": None}
    assert settings_of([first, {**first, "epochs": 1}, first]) == {
        "optimizer": "adamw",
        "learning rate": "0.001",
        "batch": "16",
        "epochs": "2, 1",
    }
