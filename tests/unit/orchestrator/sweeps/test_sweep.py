"""Sweeps without Ray: what is tried, what is refused, what is shared, who goes on, what is told."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import make_commits

from cache_store.errors import ConfigError
from cache_store.storage.open import open_storage
from orchestrator.config.sweep_schema import SweepConfig
from orchestrator.environment import Environment
from orchestrator.execution import schedule
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Outcome
from orchestrator.execution.queues import Queues
from orchestrator.reports.record_json import from_json, to_json
from orchestrator.sweeps import metric, space
from orchestrator.sweeps import plan as sweep_plan
from orchestrator.sweeps.dry_run import print_sweep
from orchestrator.sweeps.event_log import SweepLog
from orchestrator.sweeps.page import print_trials, render
from orchestrator.sweeps.prepare import PreparedSweep, claim_sweep_dir, prepare_sweep
from orchestrator.sweeps.records import SweepSummary
from orchestrator.sweeps.steering import Begun, Course, Ended, Message, SweepSteering, TrialHooks, WentOn
from orchestrator.sweeps.summary import Invocation, pareto, sweep_summary
from workers.domains.images.planning import IMAGES
from workers.domains.text.planning import TEXT
from workers.specs.experiment import ImageSpec
from workers.specs.language import TextSpec

ROOT = Path(__file__).parents[4]
BASE: dict[str, Any] = {
    "model": {"name": "resnet18", "stem": "small", "hidden": 32},
    "data": {"name": "digits", "image_size": 8, "train_limit": 96, "test_limit": 64, "validation": 48},
    "training": {"epochs": 1, "batch_size": 16},
    "regimes": ["e2e", "segprop"],
    "resources": {"device": "cpu"},
}
DEPTHS = {"split.base": {"grid": [1, 2]}, "split.segment_size": {"grid": [1, 2]}}


def write(tmp_path: Path, sweep: Any, **more: Any) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**BASE, "run_dir": str(tmp_path / "run"), **more, "sweep": sweep}, sort_keys=False))
    return path


def sweep_of(tmp_path: Path, parameters: Any = None, **more: Any) -> PreparedSweep:
    base = more.pop("base", {})
    return prepare_sweep(write(tmp_path, {"parameters": parameters or DEPTHS, **more}, **base))


def problems_of(tmp_path: Path, sweep: Any, *overrides: str, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare_sweep(write(tmp_path, sweep, **more), overrides)
    assert caught.value.exit_code == 2
    return [f"{found['key']}: {found['message']}" for found in caught.value.details["problems"]]


# -- what is tried --------------------------------------------------------------------------------------------


def section(**values: Any) -> SweepConfig:
    return SweepConfig.model_validate_json(json.dumps(values))


def test_a_grid_is_every_combination_in_order() -> None:
    found = space.points(section(parameters={"a.x": {"grid": [1, 2]}, "b": {"grid": ["u", "v"]}}))
    assert found == [{"a.x": 1, "b": "u"}, {"a.x": 1, "b": "v"}, {"a.x": 2, "b": "u"}, {"a.x": 2, "b": "v"}]


def test_draws_are_those_of_the_seed_and_stay_when_samples_or_parameters_are_added() -> None:
    lr = {"training.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}
    first = space.points(section(parameters=lr, samples=3, seed=5))
    assert first == space.points(section(parameters=lr, samples=3, seed=5))
    assert first != space.points(section(parameters=lr, samples=3, seed=6))
    more = space.points(section(parameters={**lr, "x": {"uniform": [0, 1]}}, samples=5, seed=5))
    assert [point["training.optimizer.lr"] for point in more[:3]] == [p["training.optimizer.lr"] for p in first]
    assert all(1e-4 <= point["training.optimizer.lr"] <= 1e-2 for point in more)


def test_every_point_of_the_grid_meets_the_same_draws() -> None:
    found = space.points(section(parameters={"a": {"grid": [1, 2]}, "b": {"uniform": [0, 1]}}, samples=2))
    assert [point["a"] for point in found] == [1, 2, 1, 2]
    assert found[0]["b"] == found[1]["b"] != found[2]["b"] == found[3]["b"]


def test_loguniform_is_even_on_a_logarithmic_scale_and_randint_leaves_its_end_out() -> None:
    found = space.points(section(parameters={"a": {"loguniform": [1e-4, 1.0]}, "b": {"randint": [3, 5]}}, samples=400))
    small = sum(math.log10(point["a"]) < -2 for point in found)
    assert 0.4 < small / len(found) < 0.6
    assert {point["b"] for point in found} == {3, 4}


def test_a_folder_is_named_by_the_parameters_alone() -> None:
    assert space.folder_name({"split.base": 1, "training.optimizer.lr": 0.001}) == "base=1,lr=0.001"
    odd = space.folder_name({"data.path": "/a b/c"})
    assert odd.startswith("path=_a_b_c-")
    assert odd != space.folder_name({"data.path": "/a_b/c"})
    both = space.short_keys(["training.epochs", "regimes.e2e.training.epochs"])
    assert len(set(both.values())) == 2


# -- what is refused ------------------------------------------------------------------------------------------


def test_all_problems_of_the_section_are_said_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        {
            "parameters": {
                "split.base": {"gird": [1, 2]},
                "training.epochs": {"grid": [1], "choice": [2]},
                "training.optimizer.lr": {"loguniform": [0, 1]},
                "training.clip": {"uniform": [2, 1]},
                "seed": {"grid": [1, 1]},
            },
            "samples": 0,
            "scheduler": {"name": "ahsa"},
            "metrik": "x",
        },
    )
    text = "\n".join(found)
    for words in (
        "sweep.parameters.split.base.gird: unknown key; did you mean grid?",
        "sweep.parameters.training.epochs: ",
        "exactly one of grid, choice",
        "loguniform must begin above 0",
        "uniform must go from a smaller to a larger number",
        "grid names a value twice",
        "sweep.samples: 0: must be greater than or equal to 1",
        "did you mean 'asha'?",
        "sweep.metrik: unknown key; did you mean metric?",
    ):
        assert words in text, (words, text)


def test_every_wrong_point_is_said_once_and_nothing_is_written(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        {
            "parameters": {
                "split.base": {"grid": [1, 7, 9]},
                "training.epochs": {"grid": [1, 2, 0]},
                "splt.head": {"grid": [0]},
            }
        },
    )
    assert len(found) == 4, found
    text = "\n".join(found)
    assert "split.base: 7: base + head may not exceed the 4 blocks" in text
    assert "split.base: 9: base + head may not exceed the 4 blocks" in text
    assert "training.epochs: 0: must be greater than or equal to 1" in text
    assert "splt: unknown key; did you mean split?" in text
    assert not (tmp_path / "run").exists()


def test_the_message_names_the_parameter_and_its_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_sweep(write(tmp_path, {"parameters": {"split.base": {"grid": [1, 9]}}}))
    assert "sweep parameter split.base=9: split.base: 9: base + head" in caught.value.message


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"parameters": {"store": {"grid": ["a", "b"]}}}, "is shared by all trials"),
        ({"parameters": {"resources.slots": {"grid": [1, 2]}}}, "is shared by all trials; set resources itself"),
        ({"parameters": {"split": {"grid": [{}]}, "split.base": {"grid": [1]}}}, "split.base: unknown key"),
        ({"parameters": {"seed": {"randint": [0, 9999]}}, "samples": 1001}, "1001 trials; at most 1000"),
        ({"parameters": DEPTHS, "metric": "segprob.test.loss"}, "did you mean 'segprop'?"),
        ({"parameters": DEPTHS, "metric": "segprop.test.acuracy"}, "did you mean 'test.accuracy'?"),
        (
            {"parameters": DEPTHS, "metric": "segprop.test.accuracy", "scheduler": {"name": "asha"}},
            "deciding on test would spoil it",
        ),
        ({"parameters": DEPTHS, "scheduler": {"name": "pbt"}}, "pbt changes it between two stages"),
        (
            {"parameters": {"training.optimizer.lr": {"loguniform": [1e-4, 1e-2]}}, "scheduler": {"name": "pbt"}},
            "needs one regime alone, there are e2e, segprop",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tmp_path: Path, sweep: Any, words: str) -> None:
    assert words in "\n".join(problems_of(tmp_path, sweep))


def test_schedulers_of_ray_need_ray(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path, {"parameters": DEPTHS, "scheduler": {"name": "asha"}}, resources={"runner": "local", "device": "cpu"}
    )
    assert "with resources.runner local only all is there" in found[0]


def test_problems_of_the_file_itself_are_said_once_not_per_trial(tmp_path: Path) -> None:
    assert problems_of(tmp_path, {"parameters": DEPTHS}, "training.batch_size=0") == [
        "training.batch_size: 0: must be greater than or equal to 1"
    ]


def test_an_override_reaches_into_dotted_parameters(tmp_path: Path) -> None:
    path = write(tmp_path, {"parameters": DEPTHS})
    sweep = prepare_sweep(path, ["sweep.parameters.split.base.grid=[3]", "sweep.parameters.seed.grid=[4, 5]"])
    assert [trial.parameters for trial in sweep.trials][:2] == [
        {"split.base": 3, "split.segment_size": 1, "seed": 4},
        {"split.base": 3, "split.segment_size": 1, "seed": 5},
    ]
    assert sweep.trials[0].prepared.config.split.base == 3


# -- the metric -----------------------------------------------------------------------------------------------


def test_the_metric_is_validation_of_the_first_segprop_regime_unless_said() -> None:
    kinds = {"e2e": "e2e", "two": "segprop"}
    images, text = IMAGES.metrics(ImageSpec(name="digits")), TEXT.metrics(TextSpec(name="stdlib"))
    assert metric.parse(None, None, kinds, names=images).key == "two.validation.accuracy"
    assert metric.parse(None, None, kinds, names=text).key == "two.validation.loss"
    assert metric.parse("e2e.test.loss", None, kinds, names=images).mode == "min"
    assert metric.parse("e2e.test.accuracy", None, kinds, names=images).mode == "max"
    assert metric.parse("e2e.seconds", None, kinds, names=images).mode == "min"
    assert metric.parse("e2e.seconds", "max", kinds, names=images).mode == "max"
    numbers = IMAGES.metrics(ImageSpec(name="python", targets="numbers"))
    found = [metric.parse(key, None, kinds, names=numbers) for key in (None, "e2e.validation.rmse")]
    assert [(each.name, each.mode) for each in found] == [("r2", "max"), ("rmse", "min")]
    assert found[0].written(-0.25) == "−0.2500"


# -- what is shared -------------------------------------------------------------------------------------------


def test_equal_work_of_trials_is_one_node(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    plans = {trial.name: trial.prepared.plan for trial in sweep.trials}
    assert len(plans) == 4
    kinds = sweep_plan.sharing({name: plan.nodes for name, plan in plans.items()}, lambda node: 1.0)
    assert (kinds["data"].asked, kinds["data"].run) == (4, 1)
    assert (kinds["model"].asked, kinds["model"].run) == (4, 1)
    # e2e once instead of four times; the base of depth 1 and of depth 2 each serves both segment sizes.
    asked = 4 * 1 + (4 + 3) + (3 + 2)
    assert (kinds["train"].asked, kinds["train"].run) == (asked, asked - 3 - 2)
    assert kinds["train"].seconds_asked - kinds["train"].seconds_run == 5
    assert len(sweep.plan.nodes) == sweep_plan.total(kinds.values()).run
    assert len({node.id for node in sweep.plan.nodes}) == len(sweep.plan.nodes)


def test_the_union_is_in_topological_order_and_names_who_asked(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    seen: set[str] = set()
    for node in sweep.plan.nodes:
        assert seen.issuperset(node.parents.values())
        seen.add(node.id)
    e2e = next(node for node in sweep.plan.nodes if node.label.endswith("e2e/e2e"))
    assert e2e.label.startswith("t0 (+3) ")
    assert e2e.regimes == ("t0/e2e", "t1/e2e", "t2/e2e", "t3/e2e")


def test_a_set_that_a_later_trial_reads_is_not_released(tmp_path: Path) -> None:
    # Segment sizes 1 and 2 read the same snapshots of seg1; the second trial has not begun.
    sweep = sweep_of(tmp_path, {"split.segment_size": {"grid": [1, 2]}}, base={"snapshots": {"mode": "always"}})
    first, second = (trial.prepared.plan for trial in sweep.trials)
    shared = {node.id for node in first.sets} & {node.id for node in second.sets}
    assert shared
    committed = {node.id for node in first.nodes}
    alone = sweep.plan.asking(first.targets, ())
    assert shared <= set(schedule.releasable(alone, committed=committed))
    both = sweep.plan.asking(first.targets, second.targets)
    assert shared.isdisjoint(schedule.releasable(both, committed=committed))
    # And it goes once the second has read it.
    everything = committed | {node.id for node in second.nodes}
    assert shared <= set(schedule.releasable(both, committed=everything))


def test_what_may_go_follows_what_may_be_asked_for_later(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"split.segment_size": {"grid": [1, 2]}}, base={"snapshots": {"mode": "always"}})
    first, second = (trial.prepared.plan for trial in sweep.trials)
    shared = {node.id for node in first.sets} & {node.id for node in second.sets}
    made = make_commits(sweep.plan)
    ledger = CommitLog(open_storage(f"memory://coming-{tmp_path.name}"))
    for node in first.nodes:
        ledger.add(node.id, made[node.id])
    begun = sweep.plan.asking(first.targets, second.targets)
    queues = Queues(begun, ledger, steered=True)
    for plan in (begun, sweep.plan.asking(first.targets, ()), begun):
        queues.ask(plan)
        known = {"committed": ledger.commits.keys(), "released": ledger.released}
        assert queues.releasing.releasable() == schedule.releasable(plan, **known)
        assert shared.isdisjoint(queues.releasing.releasable()) == bool(plan.coming)
        # What may come is not asked for yet.
        assert queues.starting.ready() == []
    queues.ask(sweep.plan.asking((*first.targets, *second.targets), ()))
    assert queues.starting.ready()


def test_time_left_is_corrected_by_how_predictions_fared(tmp_path: Path) -> None:
    nodes = sweep_of(tmp_path).plan.nodes
    half = {node.id: 3 * node.estimate.seconds for node in nodes[::2]}
    rest = {node.id for node in nodes} - half.keys()
    expected = 3 * sum(node.estimate.seconds for node in nodes if node.id in rest) / 2
    assert sweep_plan.seconds_left(nodes, half, rest, 2) == pytest.approx(expected)
    assert sweep_plan.seconds_left(nodes, {}, rest, 2) is None


def test_the_dry_run_shows_trials_and_sharing_and_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    path = write(tmp_path, {"parameters": DEPTHS})
    code = (
        "import sys\nfrom orchestrator.cli import main\n"
        f"assert main(['run', {str(path)!r}, '--dry-run']) == 0\n"
        "print([name for name in ('torch', 'ray', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")
    for words in ("4 trials", "segment_size", "training stages", "16", "11", "Nothing was run"):
        assert words in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


# -- who goes on ----------------------------------------------------------------------------------------------


class Judge:
    """A decider that hears everything; `stops` says which trial ends after how many stages."""

    def __init__(self, courses: list[Course], stops: Mapping[str, int] | None = None, at_once: int = 99) -> None:
        self.waiting = [Begun(course.name, course.parameters) for course in courses]
        self.stops = dict(stops or {})
        self.at_once = at_once
        self.messages: list[Message] = []
        self.heard: list[tuple[str, int, float | None, bool]] = []
        self.failed: dict[str, str] = {}
        self.running = 0

    def start(self) -> None: ...
    def close(self) -> None: ...

    def poll(self) -> list[Message]:
        found, self.messages = self.messages, []
        self.running -= sum(isinstance(message, Ended) for message in found)
        while self.waiting and self.running < self.at_once:
            found.append(self.waiting.pop(0))
            self.running += 1
        return found

    def report(self, trial: str, stages: int, value: float | None, *, last: bool) -> None:
        self.heard.append((trial, stages, value, last))
        end = last or self.stops.get(trial) == stages
        self.messages.append(Ended(trial) if end else WentOn(trial, stages))

    def fail(self, trial: str, message: str) -> None:
        self.failed[trial] = message
        self.messages.append(Ended(trial))


class World:
    """A driver that does all that is wanted, step by step, and counts."""

    def __init__(
        self, tmp_path: Path, sweep: PreparedSweep, judge: Any, *, gated: bool, journal: Path | None = None
    ) -> None:
        self.courses = [Course(t.name, t.folder, t.prepared.plan, t.parameters) for t in sweep.trials]
        self.judge = judge(self.courses)
        self.made = make_commits(sweep.plan)
        self.ledger = CommitLog(open_storage(f"memory://sweep-{tmp_path.name}"))
        self.outcome = Outcome("done")
        self.ran: list[str] = []
        self.order: list[str] = []
        self.steering = SweepSteering(
            self.courses,
            sweep.metric,
            self.judge,
            gated=gated,
            trials=TrialHooks(score=lambda course: 0.5),
            journal=SweepLog(journal),
        )
        self.plan = self.steering.plan

    def run(self, breaks: str = "", steps: int = 400) -> None:
        for _ in range(steps):
            self.plan = self.steering(self.ledger, self.outcome) or self.plan
            ready = schedule.ready(
                self.plan,
                committed=set(self.ledger.commits),
                released=self.ledger.released,
                failed=set(self.outcome.failures),
            )
            for node in ready:
                if breaks and breaks in node.label:
                    self.outcome.failures[node.id] = "broken"
                    continue
                self.ran.append(node.id)
                self.order.append(node.label)
                self.ledger.add(node.id, self.made[node.id])
            if not ready and not self.steering.open:
                return
        raise AssertionError("never ended")


def test_every_node_runs_once_whoever_asks(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    for at_once in (1, 2, 99):
        world = World(tmp_path, sweep, lambda courses, n=at_once: Judge(courses, at_once=n), gated=False)
        world.run()
        assert sorted(world.ran) == sorted(schedule.wanted(sweep.plan, committed=set()))
        assert {course.status for course in world.courses} == {"done"}
        assert [last for *_, last in world.judge.heard] == [True] * 4


def test_a_stopped_trial_runs_no_further_stage_and_no_other_regime(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"training.optimizer.lr": {"grid": [1e-3, 1e-2, 1e-1]}})
    world = World(tmp_path, sweep, lambda courses: Judge(courses, {"t1": 1, "t2": 2}), gated=True)
    world.run()
    stages = {
        name: [label for label in world.order if label.startswith(f"{name} segprop/stage")]
        for name in ("t0", "t1", "t2")
    }
    assert [len(found) for found in stages.values()] == [4, 1, 2]
    assert [course.status for course in world.courses] == ["done", "stopped", "stopped"]
    assert [label for label in world.order if label.endswith("e2e/e2e")] == ["t0 e2e/e2e"]
    assert [stages for trial, stages, *_ in world.judge.heard if trial == "t0"] == [1, 2, 3, 4]
    # What it is judged by on the way is validation, as the stage's commit has it.
    first = world.judge.heard[0]
    node = world.courses[0].plan.regimes["segprop"].stages[0]
    epochs = world.made[node].result
    kept = next(e for e in epochs["epochs"] if e["epoch"] == epochs["committed_epoch"])
    assert first[2] == kept["validation_accuracy"]


def test_a_failed_trial_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"training.optimizer.lr": {"grid": [1e-3, 1e-2]}})
    world = World(tmp_path, sweep, Judge, gated=True)
    world.run(breaks="t1 segprop/stage2")
    assert [course.status for course in world.courses] == ["done", "failed"]
    assert world.judge.failed == {"t1": "broken"}


def test_decisions_are_made_again_in_the_order_they_were_made_in(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"training.optimizer.lr": {"grid": [1e-3, 1e-2, 1e-1]}})
    journal = tmp_path / "decisions.jsonl"
    folders = [trial.folder for trial in sweep.trials]
    # The third trial was judged first, twice, then the others; the last line was torn by the kill.
    lines = [[folders[2], 1], [folders[2], 2], [folders[0], 1]]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + '["x')
    world = World(tmp_path, sweep, lambda courses: Judge(courses, {"t2": 2}), gated=True, journal=journal)
    world.run()
    assert [entry[:2] for entry in world.judge.heard][:3] == [("t2", 1), ("t2", 2), ("t0", 1)]
    assert {course.status for course in world.courses} == {"done", "stopped"}
    written = [json.loads(line) for line in journal.read_text().splitlines()]
    assert written[:3] == lines
    assert len(written) == len(world.judge.heard)


def test_a_decision_that_does_not_come_up_again_is_not_waited_for(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"training.optimizer.lr": {"grid": [1e-3, 1e-2]}})
    journal = tmp_path / "decisions.jsonl"
    journal.write_text(json.dumps([sweep.trials[0].folder, 7]) + "\n")
    world = World(tmp_path, sweep, Judge, gated=True, journal=journal)
    now = iter(range(0, 100_000, 10))
    world.steering._clock = lambda: float(next(now))
    world.run()
    assert {course.status for course in world.courses} == {"done"}


def test_a_trial_that_takes_over_stages_shares_them_and_changes_the_rest(tmp_path: Path) -> None:
    lr = "training.optimizer.lr"
    sweep = sweep_of(
        tmp_path,
        {lr: {"grid": [1e-3, 1e-2]}},
        scheduler={"name": "pbt"},
        base={"regimes": ["segprop"]},
    )
    taken, donor = sweep.trials
    changed = sweep.changed(taken, {lr: 5e-3}, [{lr: 1e-2}, {lr: 1e-2}])
    mine, theirs = (plan.regimes["segprop"].stages for plan in (changed.plan, donor.prepared.plan))
    assert mine[:2] == theirs[:2]
    rates = [changed.plan.node(node).task["train"]["optimizer"]["lr"] for node in mine]
    assert rates == [1e-2, 1e-2, 5e-3, 5e-3]
    assert set(mine[2:]).isdisjoint(theirs)


# -- what is told ---------------------------------------------------------------------------------------------


def summary_of(tmp_path: Path, **options: Any) -> SweepSummary:
    sweep = sweep_of(tmp_path, {"split.base": {"grid": [1, 2, 3]}, "split.head": {"grid": [0, 1]}}, **options)
    courses = [Course(t.name, t.folder, t.prepared.plan, t.parameters, status="done", judged=9) for t in sweep.trials]
    courses[-1].status, courses[-1].judged, courses[-1].rungs = "stopped", 1, [(1, 0.4)]
    return sweep_summary(
        "small",
        sweep.section,
        sweep.metric,
        courses,
        make_commits(sweep.plan),
        Invocation(status="done", environment=Environment(cpu="x", cores=2), wall_seconds=12.0),
    )


def test_the_summary_counts_what_was_asked_and_what_was_run(tmp_path: Path) -> None:
    summary = to_json(summary_of(tmp_path))
    json.dumps(summary, allow_nan=False)
    stages = summary["sharing"]["kinds"]["train"]
    assert stages["run"] < stages["asked"]
    assert stages["asked"] == sum(trial["stages"]["asked"] for trial in summary["trials"])
    total = summary["sharing"]["total"]
    assert total["seconds_run"] < total["seconds_asked"]
    assert [trial["best"] for trial in summary["trials"]].count(True) == 1
    best = next(trial for trial in summary["trials"] if trial["best"])
    assert best["name"] == summary["best"]
    assert best["metric"] == max(t["metric"] for t in summary["trials"] if t["status"] == "done")
    assert any(trial["pareto"] for trial in summary["trials"])


def test_benchmarks_are_columns_and_what_is_compared_with_are_rows(tmp_path: Path) -> None:
    """The publication's table of base depths."""
    values = to_json(summary_of(tmp_path))
    known = {"metric": "acc", "stderr": 0.01, "n": 100, "shots": 5}
    for number, trial in enumerate(values["trials"]):
        trial["regimes"]["segprop"]["judged"] = {"mmlu": {**known, "value": 0.5 + number / 100}}
        trial["regimes"]["e2e"]["judged"] = {"mmlu": {**known, "value": 0.7}}
    summary = from_json(SweepSummary, {**values, "judged": {"mmlu": {**known, "value": 0.4}}})
    stream = io.StringIO()
    print_trials(summary, stream)
    lines = stream.getvalue().splitlines()
    assert "MMLU" in lines[0].split()
    cells = [re.search(r"\d\d\.00 ± 1\.00", line) for line in lines[1:8]]
    assert sorted(cell.group() for cell in cells if cell) == [f"{50 + n}.00 ± 1.00" for n in range(6)] + [
        "70.00 ± 1.00"
    ]
    assert "MMLU: 5-shot, 100 questions" in lines
    page = render(summary)
    assert "<th>MMLU</th>" in page
    assert "<td>53.00 ± 1.00</td>" in page


def test_seeds_are_a_sweep_whose_regimes_are_compared_within_each_seed(tmp_path: Path) -> None:
    path = tmp_path / "seeds.yaml"
    path.write_text(yaml.safe_dump({**BASE, "run_dir": str(tmp_path / "run"), "seeds": [3, 0, 5]}))
    sweep = prepare_sweep(path)
    assert [trial.parameters for trial in sweep.trials] == [{"seed": seed} for seed in (3, 0, 5)]
    assert [trial.prepared.config.seed for trial in sweep.trials] == [3, 0, 5]
    claim_sweep_dir(sweep)
    again = prepare_sweep(tmp_path / "run" / "config.yaml", [f"run_dir={tmp_path / 'run'}"])
    assert {node.id for node in again.plan.nodes} == {node.id for node in sweep.plan.nodes}
    courses = [Course(t.name, t.folder, t.prepared.plan, t.parameters, status="done") for t in sweep.trials]
    made = make_commits(sweep.plan)
    summary = sweep_summary("small", sweep.section, sweep.metric, courses, made, Invocation(status="done"))
    stream = io.StringIO()
    print_trials(summary, stream)
    rows = [line.split() for line in stream.getvalue().splitlines()]
    assert ["e2e", "3"] in [row[:2] for row in rows]
    segprop = next(row for row in rows if row[:2] == ["segprop", "3"])
    values = [trial.regimes["segprop"].test["accuracy"] for trial in summary.trials]
    assert segprop[2] == f"{100 * sum(map(float, values)) / 3:.2f}"  # type: ignore[arg-type]
    assert "e2e" in segprop
    page = render(summary)
    assert "Over seeds" in page
    (tmp_path / "other").mkdir()
    assert "Over seeds" not in render(summary_of(tmp_path / "other"))


@pytest.mark.parametrize(
    ("seeds", "sweep", "words"),
    [
        ([1], None, "two or more different"),
        ([1, 1], None, "two or more different"),
        ([0, "x"], None, "two or more different"),
        (3, None, "two or more different"),
        ([0, 1], {"parameters": {"seed": {"grid": [0, 1]}}}, "leave one of the two out"),
        ([0, 1], {"samples": 0}, "samples"),
    ],
)
def test_seeds_that_are_none_are_refused(tmp_path: Path, seeds: Any, sweep: Any, words: str) -> None:
    more = {} if sweep is None else {"sweep": sweep}
    path = tmp_path / "seeds.yaml"
    path.write_text(yaml.safe_dump({**BASE, "run_dir": str(tmp_path / "run"), "seeds": seeds, **more}))
    with pytest.raises(ConfigError, match=words):
        prepare_sweep(path)


def test_the_front_has_what_nothing_beats() -> None:
    points = {"a": (1.0, 1.0), "b": (2.0, 0.0), "c": (0.5, 0.5), "d": (2.0, 0.0), "e": (2.0, -1.0)}
    assert pareto(points) == {"a", "b", "d"}


@pytest.mark.parametrize("options", [{}, {"scheduler": {"name": "asha"}}])
def test_the_report_shows_trials_depth_head_front_and_sharing(tmp_path: Path, options: dict[str, Any]) -> None:
    summary = summary_of(tmp_path, **options)
    page = render(summary)
    for words in ("Score against what was swept", "split.base", "split.head", "Quality, memory and time", "shared"):
        assert words in page
    assert ("Stage by stage" in page) == bool(options)
    assert page.count("<svg") == 3 + bool(options)
    assert "http://" not in page.replace("http://www.w3.org", "")
    for trial in summary.trials:
        assert f"{trial.folder}/report.html" in page
    assert render(summary) == page


def test_a_report_of_a_sweep_that_has_hardly_begun_can_be_made(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    courses = [Course(t.name, t.folder, t.prepared.plan, t.parameters) for t in sweep.trials]
    summary = sweep_summary("small", sweep.section, sweep.metric, courses, {}, Invocation(status="stopped"))
    assert "nothing to compare" in render(summary)
    stream = io.StringIO()
    print_trials(summary, stream)
    assert stream.getvalue().count("waiting") == 4


def test_the_run_directory_holds_a_file_that_makes_the_same_trials(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    claim_sweep_dir(sweep)
    again = prepare_sweep(tmp_path / "run" / "config.yaml", [f"run_dir={tmp_path / 'run'}"])
    assert [trial.folder for trial in again.trials] == [trial.folder for trial in sweep.trials]
    assert {node.id for node in again.plan.nodes} == {node.id for node in sweep.plan.nodes}
    # Growing is allowed: more values are more folders.
    more = prepare_sweep(write(tmp_path, {"parameters": {**DEPTHS, "split.base": {"grid": [1, 2, 3]}}}))
    claim_sweep_dir(more)
    assert len(list((tmp_path / "run" / "trials").iterdir())) == 6
    stream = io.StringIO()
    print_sweep(more, stream)
    assert "6 trials" in stream.getvalue()


def test_the_sweeps_of_large_models_are_planned_from_a_config_json_alone() -> None:
    folder = ROOT / "tests" / "data" / "llama-3.1-8b"
    sweep = prepare_sweep(
        ROOT / "configs" / "llama_sweep.yaml",
        [f"model.path={folder}", "data.name=stdlib", "sweep.parameters.split.base.grid=[24, 25]"],
    )
    assert [trial.parameters["split.head"] for trial in sweep.trials] == [2, 0, 2, 0]
    kinds = sweep_plan.sharing({t.name: t.prepared.plan.nodes for t in sweep.trials}, lambda node: None)
    assert kinds["model"].run == kinds["data"].run == 1
    # E2E is one of 34 stages asked for 4 times.
    assert kinds["train"].saved == 3
    assert all("segprop" in trial.prepared.plan.regimes for trial in sweep.trials)


@pytest.mark.parametrize("name", ["llama_sweep", "nemo_sweep", "resnet50_heads_sweep", "digits_sweep"])
def test_shipped_sweeps_open_with_their_command_and_cost(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    head = text[: text.index("\nmodel:")]
    assert f"segprop sweep configs/{name}.yaml" in head
    assert "Expected cost" in head
    assert "sweep" in yaml.safe_load(text)


def test_a_step_looks_only_at_trials_that_something_happened_to(tmp_path: Path) -> None:
    """By counting, not by the clock: where every commit meant a look at every trial, it would be trials² of them."""

    def looks_a_trial(count: int) -> float:
        rates = [1e-4 * (number + 1) for number in range(count)]
        folder = tmp_path / str(count)
        folder.mkdir()
        sweep = sweep_of(folder, {"training.optimizer.lr": {"grid": rates}})
        world = World(folder, sweep, Judge, gated=True)
        looks, look = 0, world.steering._look

        def counted(*args: Any) -> bool:
            nonlocal looks
            looks += 1
            return look(*args)

        world.steering._look = counted  # type: ignore[method-assign]
        world.run()
        assert {course.status for course in world.courses} == {"done"}
        return looks / count

    assert looks_a_trial(12) <= 1.2 * looks_a_trial(3)
