"""Where time went, in summaries and on the page: shares of the whole, rounds together, nothing where none is known."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from fake_run import ENVIRONMENT, make_commits, make_plan, make_summary
from summaries import read

from orchestrator.reports.commit_view import CommitFigures, TimeFigures
from orchestrator.reports.page import render
from orchestrator.reports.record_json import to_json
from orchestrator.reports.summary import summarize
from orchestrator.reports.tables.time_table import GROUPS, WORDS, part_shares, share
from orchestrator.units import seconds_text
from workers.specs.results import PHASES, TimeSpent

HOSTILE = "<script>alert('x')</script>&\"'"
TIMES: dict[str, Any] = {
    "seconds": 50.0,
    "phases": {"opening": 5.0, "data": 2.5, "forward": 10.0, "backward": 20.0, "validation": 10.0, "rest": 2.5},
    "processor": {"forward": 18.0},
    "processor_seconds": 90.0,
    "thread_seconds": 49.0,
    "system_seconds": 1.0,
    "forward": {"layer0": 3.0, "layer1": 2.0, "head": 4.0},
    "steps": 100,
    "looked_at": 10,
}


def spent(**changes: Any) -> TimeSpent:
    return TimeSpent.from_json({**TIMES, **changes})


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_summary(tmp_path_factory.mktemp("summary"), epochs=2)


def test_every_phase_has_words_and_belongs_to_one_group() -> None:
    assert set(WORDS) == set(PHASES)
    assert sorted(phase for group in GROUPS for phase in group.phases) == sorted(PHASES)


def test_shares_of_all_groups_are_the_whole_and_layers_in_a_row_are_one() -> None:
    assert sum(share(spent(), *group.phases) for group in GROUPS) == pytest.approx(1.0)
    assert share(spent(), "forward", "backward") == pytest.approx(0.6)
    assert part_shares(spent()) == {"layer0–layer1": pytest.approx(0.5), "head": pytest.approx(0.4)}
    assert share(spent(seconds=0.0, phases={}), "forward") == 0.0
    assert part_shares(spent(phases={})) == {}


def test_times_of_rounds_are_added_and_unknown_where_one_round_does_not_say(tmp_path: Path) -> None:
    total = spent() + spent(phases={"backward": 50.0}, forward={"seg9": 1.0}, host={"backward": 50.0})
    assert total.seconds == 100.0
    assert total.phases["backward"] == 70.0
    assert total.phases["opening"] == 5.0
    assert total.forward == {"layer0": 3.0, "layer1": 2.0, "head": 4.0, "seg9": 1.0}
    assert total.host == {"backward": 50.0}
    plan = make_plan(tmp_path, regimes="[segprop]", epochs=2)
    commits = make_commits(plan)
    first, second = plan.regimes["segprop"].stages[:2]
    # A newer worker may say more than this version knows.
    commits[first].result["times"] = {**TIMES, "later": 1}  # type: ignore[index]  # of this test's own commit
    summed = summarize("fake", plan, commits, status="done", environment=ENVIRONMENT)
    found = {stage.node: stage.times for stage in summed.regimes["segprop"].stages}
    assert found[first] == spent()
    assert found[second] is None
    assert "times" not in to_json(summed)["regimes"]["segprop"]["stages"][1]


def test_a_commit_says_how_much_of_its_steps_a_stage_waited_for_input(tmp_path: Path) -> None:
    phases = {"opening": 9.0, "data": 1.0, "copies": 0.5, "forward": 3.0, "backward": 5.0, "update": 0.5, "rest": 7.0}
    plan = make_plan(tmp_path, regimes="[segprop]", epochs=2)
    commit = make_commits(plan)[plan.regimes["segprop"].stages[0]]
    assert CommitFigures.of(commit).times is None
    commit.result["times"] = {**TIMES, "phases": phases, "later": 1}  # type: ignore[index]  # of this test's own commit
    times = CommitFigures.of(commit).times
    assert times is not None
    assert times.waiting == pytest.approx(0.15)
    assert TimeFigures({"opening": 2.0}).waiting is None


def test_the_page_has_a_bar_a_stage_and_none_for_runs_from_before(summary: dict[str, Any]) -> None:
    assert "Where time went" not in render(read(summary))
    told = copy.deepcopy(summary)
    stages = told["regimes"]["segprop"]["stages"]
    for stage in stages:
        stage["times"] = copy.deepcopy(TIMES)
    stages[0]["name"] = HOSTILE
    stages[0]["times"]["forward"] = {HOSTILE: 4.0}
    page = render(read(told))
    assert page.count('<div class="spent">') == len(stages) + 1, "and one of all together"
    widths = [float(width) for width in re.findall(r'<i style="width:([0-9.]+)%', page.split('class="spent"')[1])]
    assert sum(widths[:6]) == pytest.approx(100.0)
    assert 'title="hand-over: reading weights, building: 5.0 s"' in page
    assert f"<td>{seconds_text(50.0 * len(stages))}</td>" in page
    assert "<td>1.80</td>" in page, "90 processor seconds in 50"
    assert "<td>40.0 %</td>" in page
    assert page.count("<script") == 2, "the page's own"
    assert 'class="l">Stage</th><th>Data</th><th>Forward</th><th>Backward</th><th>Validation</th>' in page
