"""What a boundary costs in seconds, and plans that decide by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planning import plan_of, small_config

from cache_store.keys import digest_json
from orchestrator.config.rates import Rates
from orchestrator.costs.boundary_costs import Costs, alike_blocks, boundary_costs, make_seconds
from orchestrator.plan.graph import Plan
from orchestrator.runs.dry_run import _boundaries
from orchestrator.units import seconds_text
from workers.domains.planning import SplitRows
from workers.models.resnet.outline import resnet_outline as outline
from workers.specs.experiment import ResNetSpec
from workers.specs.results import BlockCosts, LoadCosts, MeasuredCosts

ROWS = SplitRows(train=100, validation=20, test=10)
A = BlockCosts(build=1.0, group=0.01, batch=0.02, write=0.001, open=0.002, read=0.0005)
B = BlockCosts(build=2.0, group=0.03, batch=0.05, write=0.004, open=0.003, read=0.0001)
COSTS = Costs("measured", load_group=0.1, load_batch=0.2, blocks={"a": A, "b": B})


def test_making_counts_loading_the_blocks_and_writing() -> None:
    assert make_seconds(COSTS, (("a",), ("b",)), 100, rolled=False) == pytest.approx(3 + 100 * (0.1 + 0.04 + 0.004))
    assert make_seconds(COSTS, (("a",), ("b",)), 100, rolled=True) == pytest.approx(2 + 100 * (0.002 + 0.03 + 0.004))
    assert make_seconds(COSTS, (("a", "b"),), 100, rolled=False) == pytest.approx(3 + 100 * (0.1 + 0.04 + 0.004))


def test_a_boundary_costs_its_sets_its_passes_and_otherwise_the_whole_prefix_each_time() -> None:
    found = boundary_costs(COSTS, (("a",), ("b",)), ROWS, views=2, passes=5)
    assert found.make_from_previous == pytest.approx(3 * 2 + 220 * 0.036)
    assert found.make_from_start == pytest.approx(3 * 3 + 220 * 0.144)
    # Each view and validation once for the first time, the other passes warm.
    assert found.read == pytest.approx(220 * 0.003 + (600 - 220) * 0.0001)
    assert found.recompute == pytest.approx(600 * (0.2 + 0.07))


def test_the_first_boundary_has_nothing_to_be_rolled_forward_from() -> None:
    found = boundary_costs(COSTS, (("a",),), ROWS, views=1, passes=1)
    assert found.make_from_previous == found.make_from_start


def test_nominal_seconds_follow_operations_and_bytes() -> None:
    chain = outline(ResNetSpec(name="resnet18", stem="small"), 16, 10)
    costs = Costs.nominal(chain, Rates.measured(10.0), "fp32", [4000, 3000, 2000, 1000])
    assert costs.basis == "nominal"
    assert costs.blocks["seg1"].group == pytest.approx(chain.blocks[0].flops / 10e9)
    assert costs.blocks["seg2"].write == pytest.approx(3000 / 0.4e9)
    assert costs.flops_per_s(chain) == pytest.approx(10e9)


def test_blocks_that_do_the_same_work_are_measured_once() -> None:
    chain = outline(ResNetSpec(name="resnet34", stem="small", segments="blocks"), 16, 10)
    alike = alike_blocks(chain)
    assert set(alike) == {block.name for block in chain.blocks}
    assert len(set(alike.values())) < len(alike)
    assert all(alike[name] == name for name in alike.values())


# Plans


def figures(scale: float = 1.0, read: float = 1e-5) -> MeasuredCosts:
    """A machine whose forward pass takes `scale` milliseconds a block and sample."""
    block = BlockCosts(build=0.05, group=scale / 1e3, batch=scale / 1e3, write=1e-4, open=1e-5, read=read)
    blocks = dict.fromkeys(("seg1", "seg2", "seg3", "seg4"), block)
    return MeasuredCosts(load=LoadCosts(group=1e-4, batch=1e-4), blocks=blocks)


def measured_plan(tmp_path: Path, found: MeasuredCosts | None, **changes: Any) -> Plan:
    config = small_config(tmp_path, {"snapshots.costs": "measured", "regimes": ["segprop"], **changes})
    plan = plan_of(config)
    assert len(plan.unmeasured) == 1, "lw and segprop of one model would share it"
    return plan if found is None else plan_of(config, figures=dict.fromkeys(plan.unmeasured, found))


def decided(plan: Plan) -> str:
    return "".join(each.source[0] for each in plan.regimes["segprop"].boundaries)


def test_a_fast_machine_with_a_slow_store_recomputes_and_a_slow_one_stores(tmp_path: Path) -> None:
    assert decided(measured_plan(tmp_path, figures(scale=5.0))) == "sss"
    assert decided(measured_plan(tmp_path, figures(scale=0.001, read=0.1))) == "rrr"


def test_until_there_are_figures_counted_work_decides_and_the_plan_says_what_is_missing(tmp_path: Path) -> None:
    plan = measured_plan(tmp_path, None)
    counted = plan_of(small_config(tmp_path, {"regimes": ["segprop"]}))
    assert decided(plan) == decided(counted)
    assert {each.basis for each in plan.regimes["segprop"].boundaries} == {"nominal"}
    first = plan.measuring()
    assert [node.kind for node in first.nodes] == ["data", "model", "measure"]
    assert first.targets == plan.unmeasured
    assert first.regimes == {}


def test_figures_change_decisions_and_predictions_but_no_other_nodes_id(tmp_path: Path) -> None:
    counted = plan_of(small_config(tmp_path, {"regimes": ["segprop"]}))
    plan = measured_plan(tmp_path, figures(scale=5.0))
    assert plan.unmeasured == ()
    assert {node.id for node in counted.nodes} == {node.id for node in plan.nodes if node.kind != "measure"}
    made = sum(node.estimate.seconds for node in plan.sets)
    assert made == pytest.approx(sum(each.make_seconds for each in plan.regimes["segprop"].boundaries))
    assert {each.basis for each in plan.regimes["segprop"].boundaries} == {"measured"}


def test_regimes_of_one_chain_are_measured_together_and_encodings_apart(tmp_path: Path) -> None:
    config = small_config(tmp_path, {"snapshots.costs": "measured"})
    assert len(plan_of(config).unmeasured) == 2, "lw and segprop end elsewhere; end-to-end has no boundary"
    config = small_config(
        tmp_path,
        {"snapshots.costs": "measured", "regimes": {"lw": {"variant": "mapped"}, "segprop": {}}},
    )
    assert len(plan_of(config).unmeasured) == 1, "lw and segprop of one chain"
    config = small_config(
        tmp_path,
        {
            "snapshots.costs": "measured",
            "regimes": {"a": {"kind": "segprop"}, "b": {"kind": "segprop", "training": {"optimizer": {"lr": 0.5}}}},
        },
    )
    assert len(plan_of(config).unmeasured) == 1, "a learning rate changes no speed"
    config = small_config(
        tmp_path,
        {
            "snapshots.costs": "measured",
            "regimes": {"a": {"kind": "segprop"}, "b": {"kind": "segprop", "snapshots": {"encoding": "int8"}}},
        },
    )
    assert len(plan_of(config).unmeasured) == 2


def test_modes_and_budgets_still_rule(tmp_path: Path) -> None:
    slow = figures(scale=5.0)
    assert decided(measured_plan(tmp_path, slow, **{"snapshots.mode": "never"})) == "rrr"
    assert decided(measured_plan(tmp_path, slow, **{"snapshots.budget": "1kB"})) == "rrr"
    assert decided(measured_plan(tmp_path, figures(0.001, 0.1), **{"snapshots.mode": "always"})) == "sss"


def test_every_boundary_is_shown_with_its_seconds(tmp_path: Path) -> None:
    regime = measured_plan(tmp_path, figures(scale=5.0)).regimes["segprop"]
    table = _boundaries(regime)
    assert "measured" in str(table.title)
    for column, key in ((3, "make_seconds"), (4, "read_seconds"), (5, "recompute_seconds")):
        shown = list(table.columns[column].cells)
        assert shown == [seconds_text(getattr(each, key)) for each in regime.boundaries]


# Encodings in plans


def test_a_plain_encoding_leaves_every_id_as_it_was(tmp_path: Path) -> None:
    before = plan_of(small_config(tmp_path, {"regimes": ["segprop"], "snapshots.dtype": "bfloat16"}))
    # Ids are a promise: a store stays good until FORMAT is raised or a task has new fields, and then this changes.
    assert digest_json([node.id for node in before.nodes]) == "777e45eb1ac665e2c332929d0868b095"
    before = plan_of(small_config(tmp_path, {"regimes": ["segprop"]}))
    other = plan_of(small_config(tmp_path, {"regimes": ["segprop"], "snapshots.encoding": "int8"}))
    assert {node.id for node in before.sets}.isdisjoint(node.id for node in other.sets)


def test_planned_bytes_follow_the_encoding(tmp_path: Path) -> None:
    def stored(encoding: str) -> int:
        plan = plan_of(small_config(tmp_path, {"regimes": ["segprop"], "snapshots.encoding": encoding}))
        return sum(node.estimate.snapshot_bytes for node in plan.sets)

    plain = stored("plain")
    assert stored("lossless") == plain, "the most it takes"
    assert plain / 4 < stored("int8") < plain / 3.5, "a byte of four, and a scale a map"
