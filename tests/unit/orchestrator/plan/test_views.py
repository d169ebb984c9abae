"""How many views of every sample a stage sees: a fresh one an epoch, or as many as the budget stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planning import CIFAR, plan_of, regime_node, small_config

from cache_store.errors import ConfigError
from orchestrator.plan.graph import Plan
from orchestrator.plan.views import WITHOUT_BUDGET, ViewsSeen, stored_views, unequal_views, views_to_give
from orchestrator.runs.dry_run import _boundaries, regime_rows
from workers.domains.images.planning import IMAGES

#: A view of the first and second boundary: 45,000 training samples, 64 channels of 16 x 16 and 128 of 8 x 8, float32.
FIRST, SECOND = 45_000 * 64 * 256 * 4, 45_000 * 128 * 64 * 4
VALIDATION = (FIRST + SECOND) // 9


def plan_with(tmp_path: Path, **changes: Any) -> Plan:
    settings = {"data.views": "auto", "training.epochs": 12, "regimes": ["e2e", "segprop"], **changes}
    return plan_of(small_config(tmp_path, settings))


def seen(plan: Plan, regime: str) -> dict[str, tuple[str, int, int]]:
    """Stage -> where its input comes from, the views its task holds, and the views the plan says."""
    found = plan.regimes[regime]
    return {
        plan.node(node).task["name"]: (
            found.decisions[node].source,
            plan.node(node).task["experiment"]["data"]["views"],
            found.views[node].views,
        )
        for node in found.stages
    }


# -- the rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "budget", "views"),
    [
        (12, 1000, 10),  # 100 bytes a view
        (12, 1099, 10),
        (12, 99_999, 12),  # never more than epochs
        (12, 1, 4),  # at least four: whether they are stored at all is decided elsewhere
        (3, 1, 3),
        (1, 10_000, 1),
        (0, None, 1),  # no boundary
        (400, None, 400),
    ],
)
def test_stored_boundaries_have_the_views_that_the_budget_allows(epochs: int, budget: int | None, views: int) -> None:
    assert stored_views(epochs, lambda count: 100 * count, budget) == views


def test_without_a_budget_more_than_the_least_are_stored_up_to_16_gib() -> None:
    assert stored_views(400, lambda count: count << 30, None) == 16
    assert stored_views(400, lambda count: count * WITHOUT_BUDGET, None) == 4


def test_a_stage_is_told_a_number_only_where_the_data_section_has_none() -> None:
    assert [views_to_give("auto", 5, source, 12) for source in ("images", "recompute", "snapshots")] == [12, 12, 5]
    assert views_to_give("auto", 5, "snapshots", 2) == 2
    assert views_to_give(3, 5, "images", 12) is None
    assert views_to_give(None, 5, "snapshots", 12) is None


# -- the plan -----------------------------------------------------------------------------------------------


def test_by_default_every_epoch_of_a_stage_that_reads_images_is_augmented_afresh(tmp_path: Path) -> None:
    config = small_config(tmp_path, {"data": {"name": "digits", "image_size": 16}, "snapshots.mode": "never"})
    plan = plan_of(config)
    assert seen(plan, "e2e") == {"e2e": ("images", 4, 4)}
    assert {(source, told) for source, told, _ in seen(plan, "segprop").values()} == {("images", 4), ("recompute", 4)}


def test_stored_boundaries_take_the_budget_and_the_rest_a_view_an_epoch(tmp_path: Path) -> None:
    # The first two boundaries are alive at one time: seven views of both, and validation.
    budget = 7 * (FIRST + SECOND) + VALIDATION
    plan = plan_with(tmp_path, **{"snapshots.budget": budget})
    assert seen(plan, "e2e") == {"e2e": ("images", 12, 12)}
    assert seen(plan, "segprop") == {
        "stage1-base": ("images", 12, 12),
        "stage2-seg2": ("snapshots", 7, 7),
        "stage3-seg3": ("snapshots", 7, 7),
        "stage4-seg4": ("snapshots", 7, 7),
    }
    assert [each.views for each in plan.regimes["segprop"].boundaries] == [7, 7, 7]
    assert plan.peak_snapshot_bytes == budget
    # Sets, evaluations and data are the same for any number of views.
    others = [node for node in plan.nodes if node.kind in ("materialize", "evaluate")]
    assert {node.task["experiment"]["data"]["views"] for node in others} == {1}
    assert max(node.task["view"] or 0 for node in plan.sets) == 6
    one_less = plan_with(tmp_path, **{"snapshots.budget": budget - 1})
    assert seen(one_less, "segprop")["stage2-seg2"] == ("snapshots", 6, 6)


def test_a_budget_too_small_for_four_views_recomputes_with_fresh_ones(tmp_path: Path) -> None:
    budget = 4 * (FIRST + SECOND) + VALIDATION - 1
    plan = plan_with(tmp_path, **{"snapshots.budget": budget})
    found = seen(plan, "segprop")
    assert {views for source, views, _ in found.values() if source == "recompute"} == {12}
    assert {source for source, _, _ in found.values()} == {"images", "recompute", "snapshots"}
    with pytest.raises(ConfigError, match=r"lower data\.views"):
        plan_with(tmp_path, **{"snapshots.budget": budget, "snapshots.mode": "always"})


def test_a_short_stage_sees_a_view_an_epoch_and_one_that_stops_by_steps_no_more_than_it_reaches(
    tmp_path: Path,
) -> None:
    stages = {"segprop": {"stages": {"stage3-seg3": {"epochs": 2}}}, "e2e": {}}
    found = seen(plan_with(tmp_path, regimes=stages, **{"snapshots.mode": "always"}), "segprop")
    assert found["stage3-seg3"] == ("snapshots", 2, 2)
    assert found["stage2-seg2"][2] == 4
    stopped = plan_with(tmp_path, **{"training.exit": {"steps": 800}, "snapshots.mode": "always"})
    # 703 steps an epoch: two epochs are begun.
    assert {views for _, _, views in seen(stopped, "segprop").values()} == {2}
    assert max(node.task["view"] or 0 for node in stopped.sets) == 1


def test_rounds_of_a_wave_share_the_views_of_their_stage(tmp_path: Path) -> None:
    wave = {"wave": {"kind": "segprop", "pipeline": "wavefront"}}
    plan = plan_with(tmp_path, regimes=wave, **{"snapshots.budget": "200GB", "wavefront.rounds": 3})
    told = {name: views for name, (_, views, _) in seen(plan, "wave").items()}
    assert told == {"stage1-base": 12, "stage2-seg2": 12, "stage3-seg3": 12, "stage4-seg4": 12, "final": 1}


def test_no_augmentation_is_one_view(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, **{"data.augment": "none"})
    assert {views for name in ("e2e", "segprop") for _, views, _ in seen(plan, name).values()} == {1}
    assert all(node.task["view"] in (0, None) for node in plan.sets)


def test_a_number_means_what_it_meant_and_leaves_the_ids_alone(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, **{"data.views": 2, "snapshots.budget": "200GB"})
    assert seen(plan, "e2e") == {"e2e": ("images", 2, 2)}
    assert {views for _, views, _ in seen(plan, "segprop").values()} == {2}
    assert {node.task["experiment"]["data"]["views"] for node in plan.nodes if "experiment" in node.task} == {2}
    assert plan.nodes[0].task["data"]["views"] == 1, "prepared once for all"


def test_a_longer_run_reads_the_sets_that_a_shorter_one_made(tmp_path: Path) -> None:
    # An untrained base: the weights before the boundary do not change with the epochs.
    settings: dict[str, Any] = {"snapshots.mode": "always", "split.train_base": False, "regimes": ["segprop"]}
    short, long = (plan_with(tmp_path, **settings, **{"training.epochs": epochs}) for epochs in (4, 6))
    first = {node.id for node in short.sets if node.task["boundary"]["hops"] == [["seg1"]]}
    assert len(first) == 5
    assert first < {node.id for node in long.sets}


# -- what is said of it -------------------------------------------------------------------------------------


def test_the_dry_run_says_the_views_of_every_boundary_and_stage(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, **{"snapshots.budget": 7 * (FIRST + SECOND) + VALIDATION})
    table = _boundaries(plan.regimes["segprop"])
    assert table.columns[1].header == "views"
    assert list(table.columns[1].cells) == ["7", "7", "7"]
    details = {row.label: row.detail for row in regime_rows(plan, plan.regimes["segprop"], IMAGES)}
    assert details["stage1-base"].endswith(", 12 views in 12 epochs")
    assert details["snapshots after seg1"].startswith("7 views + validation")


def test_a_regime_that_sees_fewer_views_than_another_is_named() -> None:
    stages = {"e2e": [ViewsSeen(12, 12)], "segprop": [ViewsSeen(12, 12), ViewsSeen(7, 12)]}
    (said,) = unequal_views(stages)
    assert said.startswith("segprop sees 7 views of a sample in 12 epochs (e2e 12): ")
    assert "data.views" in said
    assert "snapshots.budget" in said


@pytest.mark.parametrize(
    "stages",
    [
        {"segprop": [ViewsSeen(7, 12)]},  # compared with nobody
        {"e2e": [ViewsSeen(2, 12)], "segprop": [ViewsSeen(2, 12)]},
        {"lw": [ViewsSeen(12, 12), ViewsSeen(7, 12)], "segprop": [ViewsSeen(7, 12)]},
        {"e2e": [ViewsSeen(12, 12)], "segprop": [ViewsSeen(3, 3)]},  # trains less, but sees all it can
        {"e2e": [], "segprop": []},  # text
    ],
)
def test_equal_terms_are_not_warned_of(stages: dict[str, list[ViewsSeen]]) -> None:
    assert list(unequal_views(stages)) == []


def test_cifar_is_what_these_sizes_were_counted_with(tmp_path: Path) -> None:
    assert CIFAR.train_rows == 50_000
    spec = regime_node(plan_with(tmp_path, **{"snapshots.mode": "always"}), "segprop", "stage2-seg2").task["boundary"]
    assert spec["dtype"] == "float32"
