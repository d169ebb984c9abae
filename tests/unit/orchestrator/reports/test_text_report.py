"""Reports, tables, plans and event files of language models: loss first, the original beside it, no images."""

from __future__ import annotations

import copy
import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from fake_lm_run import make_lm_summary, scores
from fake_run import make_summary
from summaries import read
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchestrator.reports.page import render
from orchestrator.reports.tables.result_table import print_table
from orchestrator.reports.verdict import verdict
from orchestrator.runs.dry_run import print_plan, regime_rows
from orchestrator.runs.prepare import prepare
from orchestrator.trackers.table import track
from workers.domains.text.planning import TEXT

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_lm_summary(tmp_path_factory.mktemp("summary"))


@pytest.fixture(scope="module")
def page(summary: dict[str, Any]) -> str:
    return render(read(summary))


def as_task(summary: dict[str, Any]) -> dict[str, Any]:
    """The same run, on questions with candidates."""
    task = copy.deepcopy(summary)
    for regime, accuracy in zip(task["regimes"].values(), (0.60, 0.58), strict=True):
        regime["final"]["metrics"].update(accuracy=accuracy, token_accuracy=0.3)
    for metrics in task["original"].values():
        metrics.update(accuracy=0.5, token_accuracy=0.2)
    return task


def curves_of(page: str) -> ElementTree.Element:
    [figure] = re.findall(r'<svg[^>]*aria-label="Learning curves.*?</svg>', page, flags=re.DOTALL)
    return ElementTree.fromstring(figure)


def test_the_verdict_ranks_by_loss_with_perplexity_and_says_what_one_seed_is(summary: dict[str, Any]) -> None:
    text = " ".join(verdict(read(summary)))
    assert "End-to-end has the lowest test loss, 2.1000 (perplexity 8.17)" in text
    assert "SegProp 2.1200 (+0.0200, perplexity 8.33)" in text
    assert "One seed is one seed" in text
    assert "noise" not in text


def test_the_verdict_tells_what_training_added_to_the_model_as_it_came(summary: dict[str, Any]) -> None:
    text = " ".join(verdict(read(summary)))
    assert "The model as it came has a test loss of 2.8000 (perplexity 16.44): End-to-end is 0.7000 better" in text
    assert "SegProp is 0.6800 better (97 % of End-to-end's improvement)" in text
    worse = copy.deepcopy(summary)
    worse["regimes"]["segprop"]["final"]["metrics"] = scores(2.9)
    assert "SegProp is 0.1000 worse." in " ".join(verdict(read(worse)))


def test_without_an_original_nothing_is_said_of_one(tmp_path: Path) -> None:
    summary = make_lm_summary(tmp_path, original=False)
    assert "as it came" not in " ".join(verdict(read(summary)))
    page = render(read(summary))
    assert "As it came" not in page
    assert "Against the original" not in page


def test_questions_are_judged_by_how_many_are_answered(summary: dict[str, Any]) -> None:
    task = as_task(summary)
    text = " ".join(verdict(read(task)))
    assert "End-to-end has the best test accuracy, 60.00 %; SegProp 58.00 % (−2.00 points)" in text
    assert "SegProp is 8.00 points better (80 % of End-to-end's improvement)" in text
    assert "noise" not in text  # the rows are candidates, not questions
    assert '<div class="big">60.00 %</div>' in render(read(task))


def test_the_cards_lead_with_loss_and_the_best_is_the_lowest(page: str) -> None:
    cards = re.findall(r"<article.*?</article>", page, flags=re.DOTALL)
    assert ['<div class="big">2.1000</div>' in card for card in cards] == [True, False]
    assert [">best<" in card for card in cards] == [True, False]
    assert "test loss · perplexity 8.17" in cards[0]
    assert "97 %" in cards[1]


def test_long_lists_of_parts_are_abbreviated_and_equal_blocks_share_a_row(page: str) -> None:
    assert "layer0–layer19" in page
    assert "layer3 " not in page
    assert page.count("<td>384</td><td>384</td><td>1.00×</td>") == 2  # embed, and all layers
    assert "layer0–layer30" in page


def test_no_text_model_is_said_to_see_images(page: str, summary: dict[str, Any]) -> None:
    assert "images" not in page
    assert ">text</td>" in page
    assert summary["regimes"]["segprop"]["stages"][0]["source"] == "images"  # what the task says stays


@pytest.mark.parametrize("stages", [3, 7, 12, 30])
def test_labels_of_stages_do_not_overlap(tmp_path: Path, stages: int) -> None:
    figure = curves_of(render(read(make_lm_summary(tmp_path, stages=stages))))
    rows: dict[str, list[tuple[float, float]]] = {}
    for node in figure.iter():
        if node.text and node.get("x") and "font-size: 8.6px" in node.get("style", ""):
            middle, half = float(node.attrib["x"]), len(node.text) * 8.6 * 0.5 / 2  # half an em a character
            rows.setdefault(node.attrib["y"], []).append((middle - half, middle + half))
    e2e, segprop = rows.values()
    assert len(e2e) == 1
    assert len(segprop) in (stages, stages - 1)  # one may make room for the last
    assert all(first[1] < second[0] for first, second in itertools.pairwise(sorted(segprop)))


def test_stages_of_one_epoch_are_joined_and_longer_ones_are_not(page: str, tmp_path: Path) -> None:
    match = re.search(r'<g id="curves-segprop-joined-loss">\s*<path d="([^"]*)"', page)
    assert match is not None
    assert len(re.findall(r"[ML] ", match.group(1))) == 12
    assert 'id="curves-segprop-joined' not in render(read(make_lm_summary(tmp_path, epochs=2)))


def test_loss_comes_first_in_the_curves_of_text_and_accuracy_in_those_of_images(page: str, tmp_path: Path) -> None:
    def titled(page: str) -> str:
        words = [node.text for node in curves_of(page).iter() if node.text in ("loss", "accuracy")]
        return str(words[-1])

    assert titled(page) == "accuracy"  # the narrow panel on the right
    assert titled(render(read(make_summary(tmp_path, epochs=2)))) == "loss"


def test_a_network_off_the_scale_is_marked_at_the_edge(summary: dict[str, Any]) -> None:
    def drawn(loss: float) -> str:
        far = copy.deepcopy(summary)
        far["regimes"]["segprop"]["stages"][0]["assembled"] = scores(loss)
        [mark] = re.findall(r'<g id="curves-segprop-0-assembled">.*?</g>\s*</g>', render(read(far)), flags=re.DOTALL)
        return str(mark)

    assert drawn(11.0) == drawn(12.0) != drawn(2.8)


def test_every_count_of_finished_stages_renders(tmp_path: Path) -> None:
    for stages in (1, 2, 40):
        page = render(read(make_lm_summary(tmp_path, stages=stages)))
        for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
            ElementTree.fromstring(figure)


def test_the_printed_table_has_the_original_perplexity_and_shares(summary: dict[str, Any]) -> None:
    stream = io.StringIO()
    print_table(read(summary), stream)
    header, original, e2e, segprop = stream.getvalue().splitlines()
    assert re.split(r"\s{2,}", header)[:5] == ["regime", "test loss", "perplexity", "val. loss", "of e2e's gain"]
    assert re.split(r"\s{2,}", original)[:5] == ["as it came", "2.8000", "16.44", "2.8300", "–"]
    assert re.split(r"\s{2,}", e2e)[1:5] == ["2.1000", "8.17", "2.1200", "–"]
    assert re.split(r"\s{2,}", segprop)[1:5] == ["2.1200", "8.33", "2.1400", "97 %"]
    questions = io.StringIO()
    print_table(read(as_task(summary)), questions)
    assert questions.getvalue().startswith("regime             test acc.  val. acc.  of e2e's gain")


def test_event_files_have_rate_and_perplexity(tmp_path: Path, summary: dict[str, Any]) -> None:
    track(tmp_path, read(summary))
    events = EventAccumulator(str(tmp_path / "tb" / "segprop"))
    events.Reload()
    assert {scalar.value for scalar in events.Scalars("train/samples_per_second")} == {50.0}
    assert "train/images_per_second" not in events.Tags()["scalars"]
    for tag in ("validation/perplexity", "assembled/perplexity", "assembled/loss"):
        assert len(events.Scalars(tag)) == 12


def test_a_plan_for_text_speaks_of_text(tmp_path: Path) -> None:
    stream = io.StringIO()
    prepared = prepare(
        ROOT / "configs" / "lm_quickstart.yaml",
        [f"run_dir={tmp_path}", "split.base=4", "snapshots.mode=always", "training.precision=fp32"],
    )
    print_plan(prepared, stream)
    text = stream.getvalue()
    assert "text: starts at the text" in text
    details = [row.detail for row in regime_rows(prepared.plan, prepared.plan.regimes["segprop"], TEXT)]
    assert "train + validation, float32, from the start by embed, layer0–layer3" in details
    assert "images" not in text
    sources = {node.task["source"] for node in prepared.plan.nodes if node.kind == "train"}
    assert "images" in sources
