"""`orchestrator.reports.page`: one self-contained page, for whole and for broken runs."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import ENVIRONMENT, TEXT_DATA, TEXT_DATA_LINE, make_commits, make_plan, make_summary
from summaries import read

from orchestrator.reports.page import render, write_report
from orchestrator.reports.summary import summarize
from orchestrator.reports.verdict import verdict
from orchestrator.reports.words import data_lines
from workers.specs.experiment import MOST_SWALLOWED

LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}
HOSTILE = "<script>alert('x')</script>$\\frac{1}{2}$&\"'"


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_summary(tmp_path_factory.mktemp("summary"))


@pytest.fixture(scope="module")
def page(summary: dict[str, Any]) -> str:
    return render(read(summary))


class _Collector(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.loads += [value or "" for name, value in attrs if name in LOADING]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def figures_of(page: str) -> dict[str, Any]:
    """The points of curves as the page's script reads them."""
    [text] = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def points_of(page: str, gid: str) -> int:
    """Points of the line drawn in the SVG group `gid`."""
    match = re.search(rf'<g id="curves-{gid}">\s*<path d="([^"]*)"', page)
    assert match is not None, gid
    return len(re.findall(r"[ML] ", match.group(1)))


def test_nothing_is_loaded_from_outside_the_page(page: str) -> None:
    collected = _Collector(page)
    # Links to what lies beside the page are no loads.
    beside = ("#", "config.yaml", "summary.json", "log.jsonl", "tb/", "model/")
    assert all(load.startswith(beside) for load in collected.loads)
    assert not {"link", "iframe", "img", "object"} & set(collected.tags)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_across_all_figures(page: str) -> None:
    ids = _Collector(page).ids
    assert len(ids) == len(set(ids))


def test_references_inside_figures_have_a_target_and_colours_stay_colours(page: str) -> None:
    ids = set(_Collector(page).ids)
    targets = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert targets
    assert set(targets) <= ids
    for value in re.findall(r'(?:fill|stroke)(?:="|: ?)(#[^";]+)', page):
        assert re.fullmatch(r"#[0-9a-f]{3,8}", value), value


def test_figures_are_well_formed(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        ElementTree.fromstring(figure)


def test_curves_have_as_many_points_as_epochs(page: str, summary: dict[str, Any]) -> None:
    for name, regime in summary["regimes"].items():
        for index, stage in enumerate(regime["stages"]):
            for metric in ("accuracy", "loss"):
                assert points_of(page, f"{name}-{index}-validation-{metric}") == len(stage["curve"])
                assert points_of(page, f"{name}-{index}-train-{metric}") == len(stage["curve"])


def test_scores_of_the_test_split_after_every_epoch_are_curves_of_their_own(page: str, summary: dict[str, Any]) -> None:
    assert "test, whole network" not in page
    assert "looked at once" in page
    tested = copy.deepcopy(summary)
    stages = tested["regimes"]["segprop"]["stages"]
    for stage in stages:
        for epoch in stage["curve"]:
            epoch["test"] = {"accuracy": 0.25, "loss": 1.5}
            if stage["auxiliary"]:
                epoch["test_auxiliary"] = {"accuracy": 0.5, "loss": 1.25}
    drawn = render(read(tested))
    for index, stage in enumerate(stages):
        for metric in ("accuracy", "loss"):
            assert points_of(drawn, f"segprop-{index}-test-{metric}") == len(stage["curve"])
            own = f'id="curves-segprop-{index}-test_auxiliary-{metric}"' in drawn
            assert own == stage["auxiliary"]
    assert "curves-e2e-0-test-" not in drawn
    assert "test, whole network" in drawn
    assert "looked at once" not in drawn


def test_best_epochs_and_assembled_accuracies_are_marked(page: str, summary: dict[str, Any]) -> None:
    for name, regime in summary["regimes"].items():
        for index in range(len(regime["stages"])):
            assert f'id="curves-{name}-{index}-best-accuracy"' in page
            assert f'id="curves-{name}-{index}-assembled"' in page


def test_the_page_knows_the_value_of_every_point_that_it_draws(page: str, summary: dict[str, Any]) -> None:
    figure = figures_of(page)["curves"]
    lines = {line["id"].removeprefix("curves-"): line for line in figure["lines"]}
    for name, line in lines.items():
        assert points_of(page, name) == len(line["points"])
    drawn = set(re.findall(r'<g id="curves-([\w-]+-(?:train|validation)-(?:loss|accuracy))">', page))
    assert drawn == set(lines)
    stages = summary["regimes"]["segprop"]["stages"]
    before = len(stages[0]["curve"])
    wanted = [[before + 1 + index, epoch["validation_loss"]] for index, epoch in enumerate(stages[1]["curve"])]
    assert lines["segprop-1-validation-loss"]["points"] == wanted
    assert len(figure["columns"]) == len(figure["lines"][0]["key"]) + 2


def test_nothing_runs_but_the_script_that_the_policy_names(page: str) -> None:
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    [script] = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#39;", "'").split("; "))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"


def test_every_task_that_ran_is_on_the_timeline(page: str, summary: dict[str, Any]) -> None:
    for item in summary["work"]:
        assert f'id="timeline-task-{item["node"]}"' in page


def test_the_same_summary_gives_the_same_bytes(page: str, summary: dict[str, Any]) -> None:
    assert render(read(copy.deepcopy(summary))) == page


def test_hostile_names_are_escaped_in_html_and_in_figures(summary: dict[str, Any]) -> None:
    hostile = copy.deepcopy(summary)
    hostile["run"] = HOSTILE
    hostile["regimes"] = {HOSTILE if key == "lw" else key: value for key, value in hostile["regimes"].items()}
    for item in hostile["work"]:
        item["regimes"] = [HOSTILE if name == "lw" else name for name in item["regimes"]]
        item["label"] = item["label"].replace("stage1", HOSTILE)
        if item["where"]:
            item["where"]["host"] = HOSTILE
    hostile["regimes"]["segprop"]["stages"][0]["name"] = HOSTILE
    hostile["failures"] = [{"node": "x", "label": HOSTILE, "message": HOSTILE}]
    hostile["environment"]["cpu"] = HOSTILE
    hostile["environment"]["packages"][HOSTILE] = HOSTILE
    page = render(read(hostile))
    collected = _Collector(page)
    # The page's own: data, and the one script that its policy lets run.
    assert collected.tags.count("script") == page.count("<script") == 2
    assert HOSTILE in "".join(collected.text)
    assert {HOSTILE} <= {name for line in figures_of(page)["curves"]["lines"] for name in line["key"]}
    words: list[str] = []
    for figure in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        words += [text for node in ElementTree.fromstring(figure).iter() if (text := node.text)]
    assert f"{HOSTILE} · aux" in words  # as it is, not typeset as mathematics
    assert HOSTILE in words


def test_a_regime_of_a_kind_with_variants_says_which_it_is(tmp_path: Path) -> None:
    regimes = "{lw: {}, mapped: {kind: lw, variant: mapped}, segprop: {}}"
    summary = make_summary(tmp_path, regimes=regimes, epochs=2)
    assert [regime.get("variant") for regime in summary["regimes"].values()] == ["published", "mapped", None]
    page = render(read(summary))
    assert page.count("block after block, each with a local classifier; variant: published") == 1
    assert page.count("block after block, each with a local classifier; variant: mapped") == 1
    assert page.count("; variant: ") == 2


def test_every_prefix_of_a_run_renders(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, epochs=2)
    commits = make_commits(plan)
    for count in (0, 1, 3, 8, 14, len(plan.nodes) - 1):
        done = {node.id: commits[node.id] for node in plan.nodes[:count]}
        page = render(summarize("fake", plan, done, status="stopped", environment=ENVIRONMENT))
        assert "stopped before its end" in page


def test_failures_are_named_on_the_page(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, epochs=2)
    commits = make_commits(plan)
    bad = plan.regimes["segprop"].stages[-1]
    for node_id in (bad, plan.regimes["segprop"].test, plan.regimes["segprop"].validation):
        commits.pop(node_id, None)
    summary = summarize(
        "fake", plan, commits, status="failed", environment=ENVIRONMENT, failures={bad: "no space left on device"}
    )
    page = render(summary)
    assert "What failed" in page
    assert "no space left on device" in page
    assert "SegProp has no final result" in page


def test_one_regime_alone_renders_without_a_comparison(tmp_path: Path) -> None:
    summary = make_summary(tmp_path, regimes="[segprop]", epochs=2)
    assert "nothing is compared" in " ".join(verdict(read(summary)))
    assert "no finished end-to-end regime to compare with" in render(read(summary))


def test_without_a_gpu_the_page_says_that_host_memory_is_shown(page: str) -> None:
    assert "There was no GPU" in page
    assert "Peak host<br>memory" in page


def test_with_a_gpu_device_memory_is_shown(tmp_path: Path) -> None:
    page = render(read(make_summary(tmp_path, cuda=True, epochs=2)))
    assert "There was no GPU" not in page
    assert "Peak device<br>memory" in page
    assert "cuda:0" in page


def test_several_regimes_of_one_kind_get_different_colours(tmp_path: Path) -> None:
    regimes = "{e2e: {}, a: {kind: segprop}, b: {kind: segprop, split: {base: 2}}}"
    page = render(read(make_summary(tmp_path, regimes=regimes, epochs=2)))
    colours = re.findall(r'class="card" style="--c:(#\w+)"', page)
    assert len(colours) == len(set(colours)) == 3


def test_the_verdict_follows_the_figures(summary: dict[str, Any]) -> None:
    figures = copy.deepcopy(summary)
    regimes = figures["regimes"]
    for name, accuracy in (("e2e", 0.955), ("lw", 0.9369), ("segprop", 0.9523)):
        regimes[name]["final"]["metrics"]["accuracy"] = accuracy
        regimes[name]["final"]["rows"] = 10_000
    regimes["e2e"].update(host_growth_bytes=1000, seconds=100.0)
    regimes["segprop"].update(host_growth_bytes=630, seconds=125.0)
    text = " ".join(verdict(read(figures)))
    assert "End-to-end has the best test accuracy, 95.50 %" in text
    assert "SegProp 95.23 % (−0.27 points)" in text
    assert "SegProp is within noise of the best" in text
    assert "SegProp 63 %" in text
    assert "SegProp 1.25×" in text


def test_updates_that_rounding_took_are_shown_and_above_the_limit_warned_of(summary: dict[str, Any]) -> None:
    figures = copy.deepcopy(summary)
    assert "Updates lost" not in render(read(figures))
    first, second, *_ = figures["regimes"]["segprop"]["stages"]
    first["swallowed"], second["swallowed"] = MOST_SWALLOWED, MOST_SWALLOWED / 2
    page = render(read(figures))
    assert "Updates lost<br>to rounding" in page
    assert "<td>10.0 %</td>" in page
    assert "rounding to bfloat16" not in " ".join(verdict(read(figures)))
    second["swallowed"] = 0.982
    told = "Warning: rounding to bfloat16 took more than 10 % of SegProp's updates: 98 % in " + second["name"]
    assert told in " ".join(verdict(read(figures)))
    page = render(read(figures))
    assert told in page.replace("&#39;", "'")
    assert '<td><span class="chip failed">98.2 %</span></td>' in page


def test_the_data_are_described_and_what_they_lost_is_warned_of(summary: dict[str, Any], tmp_path: Path) -> None:
    assert "train 1,437 images" in render(read(summary))
    figures = copy.deepcopy(summary)
    figures["data"]["skipped"] = {".gif": 1200, ".txt": 1}
    assert "skipped 1,201 files that are no images: 1,200 .gif, 1 .txt" in render(read(figures))
    plan = make_plan(tmp_path)
    (data,) = [node.id for node in plan.nodes if node.prepares]
    commits = make_commits(plan)
    commits[data].result.update(TEXT_DATA)
    text = summarize("fake", plan, commits, status="done", environment=ENVIRONMENT)
    page = render(text)
    cells = "".join(f"<td>{cell}</td>" for cell in (260, 240, "22,320", 16, 93, 128, 412, 30, 0, 18, 2))
    assert f'<tr><td class="l">train</td>{cells}</tr>' in page
    assert page.count(TEXT_DATA["warnings"][0]) == 2
    assert f"Warning: data: {TEXT_DATA['warnings'][0]}." in verdict(text)
    assert data_lines(text.data) == [TEXT_DATA_LINE]
    del figures["data"]
    assert "<h2>Data</h2>" not in render(read(figures))


def test_equal_accuracies_share_the_first_place(summary: dict[str, Any]) -> None:
    figures = copy.deepcopy(summary)
    for name, accuracy in (("e2e", 0.95), ("lw", 0.90), ("segprop", 0.95)):
        figures["regimes"][name]["final"]["metrics"]["accuracy"] = accuracy
    first = verdict(read(figures))[0]
    assert first.startswith("End-to-end and SegProp share the best test accuracy, 95.00 %; Layer-wise 90.00 %")
    figures["regimes"]["lw"]["final"]["metrics"]["accuracy"] = 0.95
    assert "End-to-end, Layer-wise and SegProp share" in verdict(read(figures))[0]
    assert not any("noise" in sentence for sentence in verdict(read(figures)))


def test_an_unfinished_regime_is_not_compared_by_cost(summary: dict[str, Any]) -> None:
    figures = copy.deepcopy(summary)
    figures["regimes"]["segprop"]["status"] = "partial"
    cost = [sentence for sentence in verdict(read(figures)) if "Training time" in sentence]
    assert len(cost) == 1
    assert "SegProp" not in cost[0]


def test_a_long_pause_is_cut_out_of_the_timeline(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, epochs=2)
    commits = make_commits(plan)
    for node in plan.nodes:
        if "segprop" in node.regimes and len(node.regimes) == 1:
            commits[node.id].result["where"]["started"] += 7200
            commits[node.id].result["where"]["finished"] += 7200
    page = render(summarize("fake", plan, commits, status="done", environment=ENVIRONMENT))
    assert "pauses cut out" in page
    assert re.search(r"pause (2 h|1 h 5\d min)", page)


def test_no_absolute_path_gets_into_the_page(summary: dict[str, Any]) -> None:
    figures = copy.deepcopy(summary)
    figures["regimes"]["segprop"]["export"] = "/home/somebody/runs/x/model/segprop/model.safetensors"
    page = render(read(figures))
    assert "/home/somebody" not in page
    assert "model/segprop/load_model.py" in page


def test_report_replaces_the_old_one_and_leaves_nothing_beside_it(
    tmp_path: Path, summary: dict[str, Any], page: str
) -> None:
    path = tmp_path / "run" / "report.html"
    write_report(read(summary), path)
    write_report(read(summary), path)
    assert path.read_text() == page
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]
