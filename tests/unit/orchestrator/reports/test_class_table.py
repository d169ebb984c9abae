"""Class by class: rows of the report, from a summary alone."""

from __future__ import annotations

from dataclasses import replace

from summaries import bare_regime, bare_summary

from orchestrator.reports.page import render
from orchestrator.reports.record_json import from_json, to_json
from orchestrator.reports.records import About, ClassCounts, Summary
from orchestrator.reports.tables.class_table import MOST_ROWS, class_table

COUNTS = ClassCounts(samples=(4, 5, 0), right=(3, 5, 0), said=(3, 5, 1), confused=((0, 2, 1),))
NAMES = ("cat", "<dog>", "bird")


def summary(counts: ClassCounts, names: tuple[str, ...] | None) -> Summary:
    def regime(kind: str, by_class: ClassCounts | None) -> object:
        made = bare_regime(kind)
        return replace(made, final=replace(made.final, by_class=by_class))

    regimes = {"e2e": regime("e2e", counts), "lw": regime("lw", None), "segprop": regime("segprop", counts)}
    return bare_summary(regimes=regimes, about=About("m", "d", 0, None, names))


def test_every_class_has_what_each_regime_made_of_it() -> None:
    table = class_table(summary(COUNTS, NAMES))
    assert (table.regimes, table.left_out) == (("e2e", "segprop"), 0)
    assert [(row.name, row.samples) for row in table.rows] == [("cat", 4), ("<dog>", 5), ("bird", 0)]
    cat, dog, bird = (row.cells[1] for row in table.rows)
    assert (cat.text, cat.share, cat.taken_for) == ("75.0 %", 0.75, "bird (1×)")
    assert (dog.text, dog.taken_for) == ("100.0 %", "")
    assert (bird.text, bird.share) == ("–", None)


def test_of_many_classes_the_worst_are_shown() -> None:
    count = MOST_ROWS + 5
    counts = ClassCounts((100,) * count, tuple(range(count)), (100,) * count, ())
    table = class_table(summary(counts, None))
    assert [row.name for row in table.rows] == [str(number) for number in range(MOST_ROWS)]
    assert table.left_out == 5


def test_the_page_shows_classes_escaped_and_only_where_they_were_counted() -> None:
    found = summary(COUNTS, NAMES)
    page = render(found)
    assert "<h2>Class by class</h2>" in page
    assert "&lt;dog&gt;" in page
    assert "<dog>" not in page
    assert from_json(Summary, to_json(found)) == found
    assert "<h2>Class by class</h2>" not in render(bare_summary(regimes={"lw": bare_regime("lw")}))
