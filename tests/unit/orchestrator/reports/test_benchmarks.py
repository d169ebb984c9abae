"""Scores on public benchmarks in tables, in the report and in its figure, from a summary alone."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_lm_run import make_lm_summary
from summaries import bare_regime, bare_stage, bare_summary, read

from orchestrator.cli import main
from orchestrator.reports.figures.benchmark_curve import benchmark_curve
from orchestrator.reports.page import render
from orchestrator.reports.record_json import to_json
from orchestrator.reports.records import BenchmarkScore, ContaminatedBy, Summary
from orchestrator.reports.summary import write_summary
from orchestrator.reports.tables import benchmarks
from orchestrator.reports.tables.result_table import print_table
from orchestrator.reports.verdict import verdict


def score(value: float, stderr: float | None = 0.004, shots: int = 5) -> BenchmarkScore:
    return BenchmarkScore("acc", value, stderr, 14_042, shots)


def summary() -> Summary:
    stages = (
        bare_stage(name="stage1-base", layer=19, judged={"mmlu": score(0.5)}),
        bare_stage(name="stage2", layer=20, judged={"mmlu": score(0.51)}),
        bare_stage(name="stage3", layer="head", judged={"mmlu": score(0.52), "humaneval_plus": score(0.1, None, 0)}),
    )
    e2e = bare_regime("e2e", stages=(bare_stage(judged={"mmlu": score(0.55)}),))
    regimes = {"e2e": e2e, "segprop": bare_regime("segprop", stages=stages), "lw": bare_regime("lw")}
    return bare_summary(regimes=regimes, judged={"mmlu": score(0.48)})


def test_layers_carry_a_line_and_the_original_and_e2e_stand_across() -> None:
    curve = benchmark_curve(summary())
    assert curve is not None
    assert curve.ticks == ((19, "19"), (20, "20"), (21, "LM head"))
    [line] = curve.lines["MMLU"]
    assert (line.regime, line.points, line.errors) == (
        "segprop",
        ((19, 0.5), (20, 0.51), (21, 0.52)),
        (0.004, 0.004, 0.004),
    )
    assert curve.across["MMLU"] == ((None, 0.48), ("e2e", 0.55))
    # A benchmark without errors, of the last stage alone.
    assert (curve.lines["HumanEval+"][0].points, curve.lines["HumanEval+"][0].errors) == (((21, 0.1),), ())
    assert curve.across["HumanEval+"] == ()


def test_nothing_is_drawn_where_nothing_was_asked() -> None:
    plain = bare_summary(regimes={"segprop": bare_regime("segprop", stages=(bare_stage(layer=3),))})
    assert benchmark_curve(plain) is None
    assert benchmarks.notes_of(plain) == []
    assert "<h2>Benchmarks</h2>" not in render(plain)


def test_the_terminal_shows_what_regimes_come_to_beside_the_original() -> None:
    stream = io.StringIO()
    print_table(summary(), stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].split()[:3] == ["regime", "MMLU", "HumanEval+"]
    assert lines[1].split()[:6] == ["as", "it", "came", "48.00", "±", "0.40"]
    assert "52.00 ± 0.40" in next(line for line in lines if line.startswith("SegProp"))
    assert lines[-1] == (
        "Per cent ± standard error. MMLU: 5-shot, 14,042 questions. HumanEval+: acc, 14,042 questions."
    )


def test_scores_of_models_that_were_trained_on_the_questions_are_marked() -> None:
    marked = replace(score(0.9), contaminated=ContaminatedBy(asked=14_042, same=12, near=3))
    assert benchmarks.cell(marked) == "90.00 ± 0.40*"
    assert (
        "* trained on 12 of them and on near-duplicates (13 words in a row) of 3"
        in benchmarks.notes([{"mmlu": marked}])[0]
    )


def test_the_report_draws_and_lists_them(tmp_path: Path) -> None:
    values = make_lm_summary(tmp_path, stages=3)
    plain = read(values)
    values["judged"] = {"mmlu": to_json(score(0.48))}
    for regime in values["regimes"].values():
        for number, stage in enumerate(regime["stages"]):
            stage["judged"] = {"mmlu": to_json(score(0.5 + number / 100))}
    found = read(json.loads(json.dumps(values)))
    page = render(found)
    for words in (
        "<h2>Benchmarks</h2>",
        "50.00 ± 0.40",
        "48.00 ± 0.40",
        "MMLU: 5-shot, 14,042 questions",
        "segprop-full-mmlu",
    ):
        assert words in page, words
    # What is drawn without benchmarks stays as it is.
    assert all(figure in page for figure in svgs(render(plain)))
    assert len(svgs(page)) == len(svgs(render(plain))) + 1


def svgs(page: str) -> list[str]:
    return [f"<svg{part.partition('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]


def test_the_verdict_says_what_changed_against_the_original_and_what_may_be_chance(tmp_path: Path) -> None:
    values = make_lm_summary(tmp_path, stages=2)
    values["judged"] = {"mmlu": to_json(score(0.48))}
    values["regimes"]["e2e"]["stages"][-1]["judged"] = {"mmlu": to_json(score(0.47))}
    values["regimes"]["segprop"]["stages"][-1]["judged"] = {"mmlu": to_json(score(0.50))}
    assert (
        "On MMLU (14,042 questions) the original has 48.00 %; against that, in points: End-to-end −1.00 (no difference "
        "shown), SegProp +2.00."
    ) in verdict(read(values))


def test_runs_are_compared_by_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shift in (("one", 0.0), ("two", 0.1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"run: {name}\nseed: {name}\n")
        e2e = bare_regime("e2e", stages=(bare_stage(judged={"mmlu": score(0.5 + shift)}),))
        write_summary(tmp_path / name / "summary.json", bare_summary(regimes={"e2e": e2e}))
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["compare", *runs]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("e2e MMLU"))
    assert row.split()[2:] == ["50.00", "±", "0.40", "60.00", "±", "0.40"]
    assert main(["compare", *runs, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]["e2e"]
    assert [result["judged"]["mmlu"]["value"] for result in results] == [0.5, 0.6]
