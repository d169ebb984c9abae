"""The stage graph: who trains what, from which weights, over which data, and when two nodes are one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning import CIFAR, plan_of, regime_node, small_config, small_plan

from cache_store.errors import ConfigError
from orchestrator.config.load import load
from orchestrator.plan.graph import Node, Plan, node_id
from orchestrator.regimes.stages import Cut
from orchestrator.regimes.table import layout
from orchestrator.runs.prepare import prepare
from workers.models.resnet.outline import resnet_outline
from workers.specs import as_json
from workers.specs.task_kinds import TASKS

CONFIGS = sorted((Path(__file__).parents[4] / "configs").glob("*.yaml"))
TEXT_CONFIGS = [path for path in CONFIGS if "family: causal_lm" in path.read_text()]
LABELLED_CONFIGS = [path for path in CONFIGS if "family: hf_text" in path.read_text()]
IMAGE_CONFIGS = [path for path in CONFIGS if path not in (*TEXT_CONFIGS, *LABELLED_CONFIGS)]


def names(plan: Plan, regime: str) -> list[str]:
    return [plan.node(node).task["name"] for node in plan.regimes[regime].stages]


def weights_of(plan: Plan, node: Node) -> dict[str, str]:
    """Part -> name of the stage (or `model`) its weights come from."""
    return {
        role.removeprefix("weights/"): plan.node(parent).task.get("name", plan.node(parent).kind)
        for role, parent in node.parents.items()
        if role.startswith("weights/")
    }


# -- the algorithm ------------------------------------------------------------------------------------------


def stages(kind: Any, n: int = 4, **changes: Any) -> list[tuple[str, ...]]:
    """Each stage as `name: hops > path` with trained parts in capitals."""
    options: dict[str, Any] = {
        "base": 1,
        "head": 0,
        "segment_size": 1,
        "frozen_intermediate": False,
        "train_base": True,
    }
    described = []
    for stage in layout(kind, [f"b{index}" for index in range(n)], Cut(**{**options, **changes})):
        path = " ".join(part.upper() if part in stage.trained else part for part in stage.path)
        hops = " | ".join(" ".join(hop) for hop in stage.hops)
        described.append(f"{stage.name}: {hops} > {path}")
    return described


def test_e2e_trains_everything_from_the_images() -> None:
    assert stages("e2e") == ["e2e:  > B0 B1 B2 B3 HEAD"]


@pytest.mark.parametrize("kind", ["badam", "lisa"])
def test_regimes_of_blocks_train_everything_in_one_stage(kind: str) -> None:
    assert stages(kind) == [f"{kind}:  > B0 B1 B2 B3 HEAD"]
    assert stages(kind, untrained=frozenset({"b0"})) == [f"{kind}:  > b0 B1 B2 B3 HEAD"]


def test_segprop_omits_intermediate_blocks_behind_an_adapter() -> None:
    assert stages("segprop") == [
        "stage1-base:  > B0 adapter HEAD",
        "stage2-b1: b0 > B1 adapter HEAD",
        "stage3-b2: b0 | b1 > B2 adapter HEAD",
        "stage4-b3: b0 | b1 | b2 > B3 HEAD",
    ]


def test_segprop_with_a_longer_base_head_and_segments() -> None:
    assert stages("segprop", n=9, base=2, head=2, segment_size=2) == [
        "stage1-base:  > B0 B1 adapter B7 B8 HEAD",
        "stage2-b2-b3: b0 b1 > B2 B3 adapter B7 B8 HEAD",
        "stage3-b4-b5: b0 b1 | b2 b3 > B4 B5 adapter B7 B8 HEAD",
        "stage4-b6: b0 b1 | b2 b3 | b4 b5 > B6 B7 B8 HEAD",
    ]


def test_frozen_intermediate_blocks_stay_in_the_path_and_need_no_adapter() -> None:
    assert stages("segprop", head=1, frozen_intermediate=True) == [
        "stage1-base:  > B0 b1 b2 B3 HEAD",
        "stage2-b1: b0 > B1 b2 B3 HEAD",
        "stage3-b2: b0 | b1 > B2 B3 HEAD",
    ]


def test_an_untrained_base_is_a_boundary_from_the_first_stage_on() -> None:
    assert stages("segprop", base=2, train_base=False) == [
        "stage1-base: b0 b1 > adapter HEAD",
        "stage2-b2: b0 b1 > B2 adapter HEAD",
        "stage3-b3: b0 b1 | b2 > B3 HEAD",
    ]
    assert stages("segprop", base=4, train_base=False) == ["stage1-base: b0 b1 b2 b3 > HEAD"]


def test_a_base_up_to_the_head_is_one_stage_without_adapter() -> None:
    assert stages("segprop", base=3, head=1) == ["stage1-base:  > B0 B1 B2 B3 HEAD"]


def test_a_base_in_pieces_keeps_the_rest_of_itself_in_the_path() -> None:
    assert stages("segprop", n=7, base=4, base_segment_size=3, head=1) == [
        "stage1-base:  > B0 B1 B2 b3 adapter B6 HEAD",
        "stage2-b3: b0 b1 b2 > B3 adapter B6 HEAD",
        "stage3-b4: b0 b1 b2 | b3 > B4 adapter B6 HEAD",
        "stage4-b5: b0 b1 b2 | b3 | b4 > B5 B6 HEAD",
    ]
    # A stem (an embedding) goes with the first piece and is not counted.
    assert stages("segprop", n=5, base=3, base_segment_size=1, first_segment=2, frozen_intermediate=True) == [
        "stage1-base:  > B0 B1 b2 b3 b4 HEAD",
        "stage2-b2: b0 b1 > B2 b3 b4 HEAD",
        "stage3-b3: b0 b1 | b2 > B3 b4 HEAD",
        "stage4-b4: b0 b1 | b2 | b3 > B4 HEAD",
    ]


@pytest.mark.parametrize("size", [3, 4, 100])
def test_one_piece_is_the_whole_base(size: int) -> None:
    assert stages("segprop", base=3, base_segment_size=size) == stages("segprop", base=3)


def test_the_adapter_of_a_piece_leads_from_the_end_of_the_base() -> None:
    cut = Cut(base=3, head=0, segment_size=1, frozen_intermediate=False, train_base=True, base_segment_size=1)
    found = layout("segprop", ["b0", "b1", "b2", "b3"], cut)
    assert [stage.adapter for stage in found] == [(3, 4), (3, 4), (3, 4), None]


def test_top_down_begins_under_the_head_and_reads_boundaries_of_the_untrained_network() -> None:
    assert stages("segprop", n=6, base=2, head=1, segment_size=2, frozen_intermediate=True, top_down=True) == [
        "stage1-b4: b0 b1 | b2 b3 > B4 B5 HEAD",
        "stage2-b2-b3: b0 b1 > B2 B3 b4 B5 HEAD",
        "stage3-base:  > B0 B1 b2 b3 b4 B5 HEAD",
    ]
    # A base in pieces comes last, piece after piece; one that is taken as it comes has no stage.
    pieces = {"base": 2, "base_segment_size": 1, "frozen_intermediate": True, "top_down": True}
    assert stages("segprop", n=3, **pieces) == [
        "stage1-b2: b0 | b1 > B2 HEAD",
        "stage2-b1: b0 > B1 b2 HEAD",
        "stage3-base:  > B0 b1 b2 HEAD",
    ]
    untrained = {"base": 2, "train_base": False, "frozen_intermediate": True, "top_down": True}
    assert stages("segprop", n=4, **untrained) == ["stage1-b3: b0 b1 | b2 > B3 HEAD", "stage2-b2: b0 b1 > B2 b3 HEAD"]


def test_layer_wise_trains_every_block_with_a_local_head_then_the_head() -> None:
    assert stages("lw", n=3) == [
        "stage1-b0:  > B0 aux",
        "stage2-b1: b0 > B1 aux",
        "stage3-b2: b0 | b1 > B2 aux",
        "head: b0 | b1 | b2 > HEAD",
    ]
    assert stages("lw", n=3, segment_size=2) == [
        "stage1-b0-b1:  > B0 B1 aux",
        "stage2-b2: b0 b1 > B2 aux",
        "head: b0 b1 | b2 > HEAD",
    ]


def test_adapters_and_local_heads_know_their_boundaries() -> None:
    options: dict[str, Any] = {"segment_size": 1, "frozen_intermediate": False, "train_base": True}
    blocks = ["b0", "b1", "b2", "b3"]
    assert [stage.adapter for stage in layout("segprop", blocks, Cut(base=1, head=1, **options))] == [
        (1, 3),
        (2, 3),
        None,
    ]
    assert [stage.aux for stage in layout("lw", blocks, Cut(base=1, head=0, **options))] == [1, 2, 3, 4, None]


# -- weights ------------------------------------------------------------------------------------------------


def test_weights_come_from_the_latest_stage_that_trained_them(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    assert weights_of(plan, regime_node(plan, "segprop", "stage1-base")) == {"seg1": "model", "head": "model"}
    assert weights_of(plan, regime_node(plan, "segprop", "stage3-seg3")) == {
        "seg1": "stage1-base",
        "seg2": "stage2-seg2",
        "seg3": "model",
        "head": "stage2-seg2",
    }
    assert weights_of(plan, regime_node(plan, "lw", "head")) == {
        "seg1": "stage1-seg1",
        "seg2": "stage2-seg2",
        "seg3": "stage3-seg3",
        "seg4": "stage4-seg4",
        "head": "model",
    }
    final = {part: plan.node(node).task["name"] for part, node in plan.regimes["segprop"].weights.items()}
    assert final == {
        "seg1": "stage1-base",
        "seg2": "stage2-seg2",
        "seg3": "stage3-seg3",
        "seg4": "stage4-seg4",
        "head": "stage4-seg4",
    }


def test_the_head_optimizer_is_carried_along_segprop_stages_only(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"training.head_optimizer": "carry"})
    carried = [node.label for node in plan.nodes if "optimizer" in node.parents]
    assert carried == ["segprop/stage2-seg2", "segprop/stage3-seg3", "segprop/stage4-seg4"]
    third = regime_node(plan, "segprop", "stage3-seg3")
    assert plan.node(third.parents["optimizer"]).label == "segprop/stage2-seg2"
    assert not any("optimizer" in node.parents for node in small_plan(tmp_path).nodes)


def test_evaluations_assemble_the_whole_chain(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    regime = plan.regimes["segprop"]
    second = plan.node(regime.assembled[regime.stages[1]])
    assert second.task["path"] == ["seg1", "seg2", "seg3", "seg4", "head"]
    assert weights_of(plan, second)["seg3"] == "model"
    assert weights_of(plan, second)["head"] == "stage2-seg2"
    assert regime.validation == regime.assembled[regime.stages[-1]]
    assert plan.node(regime.test).task["split"] == "test"
    assert set(plan.node(regime.test).parents.values()) >= set(regime.weights.values())
    without = small_plan(tmp_path, {"evaluation.stages": False}).regimes["segprop"]
    assert without.assembled == {}
    assert without.test == regime.test


# -- snapshots ----------------------------------------------------------------------------------------------


def test_a_stage_reads_one_set_per_view_it_uses_and_one_for_validation(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"data.views": 3, "regimes": {"segprop": {"stages": {"stage3-seg3": {"epochs": 2}}}}})
    reads = {
        name: [role for role in regime_node(plan, "segprop", name).parents if role.startswith("snapshot/")]
        for name in names(plan, "segprop")
    }
    three = ["snapshot/train/0", "snapshot/validation/eval", "snapshot/train/1", "snapshot/train/2"]
    assert reads == {
        "stage1-base": [],
        "stage2-seg2": three,
        "stage3-seg3": three[:3],
        "stage4-seg4": three,
    }


def test_sets_are_rolled_forward_from_the_boundary_before(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"regimes": ["segprop"]})
    by_label = {node.label: node for node in plan.nodes if node.kind == "materialize"}
    assert list(by_label) == [
        f"segprop/snapshot {block} {what}"
        for block in ("seg1", "seg2", "seg3")
        for what in ("train view 0", "validation", "train view 1")
    ]
    third = by_label["segprop/snapshot seg3 train view 1"]
    assert plan.node(third.parents["previous"]) is by_label["segprop/snapshot seg2 train view 1"]
    assert weights_of(plan, third) == {"seg1": "stage1-base", "seg2": "stage2-seg2", "seg3": "stage3-seg3"}
    assert third.task["boundary"]["hops"] == [["seg1"], ["seg2"], ["seg3"]]
    assert (third.task["split"], third.task["view"]) == ("train", 1)
    assert "previous" not in by_label["segprop/snapshot seg1 validation"].parents
    assert by_label["segprop/snapshot seg1 validation"].task["view"] is None


def test_recomputing_needs_no_sets_but_the_same_boundary(tmp_path: Path) -> None:
    stored, recomputed = small_plan(tmp_path), small_plan(tmp_path, {"snapshots.mode": "never"})
    assert not any(node.kind == "materialize" for node in recomputed.nodes)
    with_sets, without = (regime_node(plan, "segprop", "stage3-seg3") for plan in (stored, recomputed))
    assert (with_sets.task["source"], without.task["source"]) == ("snapshots", "recompute")
    assert with_sets.task["boundary"] == without.task["boundary"]
    assert regime_node(stored, "segprop", "stage1-base").task["source"] == "images"
    assert regime_node(stored, "segprop", "stage1-base").task["boundary"] is None


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("fp32", "auto", "float32"),
        ("bf16", "auto", "bfloat16"),
        ("fp16", "auto", "float16"),
        ("bf16", "float32", "float32"),
    ],
)
def test_snapshots_have_the_type_training_computes_in(
    tmp_path: Path, precision: str, dtype: str, expected: str
) -> None:
    plan = small_plan(tmp_path, {"training.precision": precision, "snapshots.dtype": dtype})
    assert regime_node(plan, "lw", "head").task["boundary"]["dtype"] == expected


def test_an_untrained_base_shares_one_boundary_between_the_first_two_stages(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"split": {"train_base": False}, "regimes": ["segprop"]})
    first, second = (plan.regimes["segprop"].reads[node] for node in plan.regimes["segprop"].stages[:2])
    assert first == second
    assert len(first) == 3
    assert weights_of(plan, plan.node(first[0])) == {"seg1": "model"}


# -- identity -----------------------------------------------------------------------------------------------


def test_every_task_reads_back_and_every_parent_comes_first(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    seen: set[str] = set()
    for node in plan.nodes:
        task = as_json.from_json(TASKS[node.kind].spec, node.task)
        assert as_json.to_json(task) == node.task
        assert set(node.parents.values()) <= seen
        assert node.id == node_id(node.kind, node.task, node.parents, node.versions)
        assert len(node.id) == 32
        seen.add(node.id)
    assert len(seen) == len(plan.nodes)
    assert set(plan.targets) <= seen
    json.dumps(plan.to_json())


def test_the_same_configuration_gives_the_same_plan(tmp_path: Path) -> None:
    assert small_plan(tmp_path).to_json() == small_plan(tmp_path).to_json()


def test_equal_work_of_two_regimes_is_one_node(tmp_path: Path) -> None:
    plan = small_plan(
        tmp_path,
        {
            "regimes": {
                "a": {"kind": "segprop"},
                "b": {"kind": "segprop", "stages": {"stage3-seg3": {"epochs": 9}}},
                "e2e": {},
            }
        },
    )
    a, b = plan.regimes["a"].stages, plan.regimes["b"].stages
    assert a[:2] == b[:2]
    assert not set(a[2:]) & set(b[2:])
    shared = plan.node(a[1])
    assert (shared.regimes, shared.label) == (("a", "b"), "a/stage2-seg2")
    assert [plan.node(node.id).regimes for node in plan.nodes if node.kind == "data"] == [("a", "b", "e2e")]


def test_a_base_in_pieces_is_the_split_with_such_segments_where_blocks_stay_in_the_path(tmp_path: Path) -> None:
    regimes = {
        "pieces": {"kind": "segprop", "split": {"base": 3, "base_segment_size": 1}},
        "segments": {"kind": "segprop", "split": {"base": 1, "segment_size": 1}},
    }
    plan = small_plan(tmp_path, {"split.intermediate": "frozen", "regimes": regimes})
    assert plan.regimes["pieces"].stages == plan.regimes["segments"].stages
    assert len(plan.regimes["pieces"].stages) == 4


def test_top_down_makes_all_snapshots_of_the_untrained_network_each_from_the_one_before(tmp_path: Path) -> None:
    split = {"intermediate": "frozen", "order": "top_down"}
    plan = small_plan(tmp_path, {"split": split, "snapshots.mode": "always", "regimes": ["segprop"]})
    model = next(node.id for node in plan.nodes if node.kind == "model")
    sets = [node for node in plan.nodes if node.kind == "materialize"]
    assert sets
    for node in sets:
        assert {parent for role, parent in node.parents.items() if role.startswith("weights/")} == {model}
    # The shallowest is made from images, every other one from the boundary before it.
    shallowest = {node.label for node in sets if "previous" not in node.parents}
    assert {label.split()[1] for label in shallowest} == {"seg1"}
    # All are alive when the first stage begins.
    bottom_up = small_plan(tmp_path, {"split.intermediate": "frozen", "snapshots.mode": "always"})
    assert plan.regimes["segprop"].peak_snapshot_bytes > bottom_up.regimes["segprop"].peak_snapshot_bytes
    stages = [plan.node(stage) for stage in plan.regimes["segprop"].stages]
    assert [stage.label.split("/")[1] for stage in stages] == [
        "stage1-seg4",
        "stage2-seg3",
        "stage3-seg2",
        "stage4-base",
    ]
    assert not plan.regimes["segprop"].truncated


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "would leave out the segments it has just trained"),
        ({"split.intermediate": "frozen", "pipeline": "wavefront"}, "not with pipeline wavefront"),
        ({"split.intermediate": "frozen", "split.base": 4, "split.train_base": False}, "there is no stage"),
    ],
    ids=["omit", "wavefront", "nothing to train"],
)
def test_top_down_is_refused_where_it_makes_no_sense(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_plan(tmp_path, {"split.order": "top_down", "regimes": ["segprop"], **changes})


def test_chains_cut_at_different_convolutions_start_from_the_same_weights(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"regimes": {"one": {"kind": "segprop"}, "two": {"kind": "segprop", "head_convs": 2}}})
    assert [node.regimes for node in plan.nodes if node.kind == "model"] == [("one", "two")]
    assert not set(plan.regimes["one"].stages) & set(plan.regimes["two"].stages)


def test_published_layer_wise_gives_the_last_stage_the_classifier_alone(tmp_path: Path) -> None:
    changes = {
        "model": {"name": "resnet50", "head_convs": 3},
        "data": {"name": "cifar10", "path": "x", "image_size": 224},
        "regimes": {"lw": {}, "mapped": {"kind": "lw", "variant": "mapped"}, "segprop": {}},
    }
    config = small_config(tmp_path, changes)
    plan = plan_of(config)
    assert {name: config.regime(name).variant for name in config.regimes} == {
        "lw": "published",
        "mapped": "mapped",
        "segprop": None,
    }
    trained: dict[str, list[int]] = {}
    for name in ("lw", "mapped"):
        outline = resnet_outline(config.regime(name).model, 224, 10)
        stages = config.regime(name).layout([block.name for block in outline.blocks])
        assert [stage.name for stage in stages] == ["stage1-seg1", "stage2-seg2", "stage3-seg3", "stage4-seg4", "head"]
        trained[name] = [
            sum(outline.part(part).parameters for part in stage.trained)
            + (0 if stage.aux is None else outline.aux(stage.aux).parameters)
            for stage in stages
        ]
    assert trained["lw"][4] == 2048 * 512 + 512 + 512 * 10 + 10
    assert trained["mapped"][4] == 5_516_810
    assert trained["lw"][:3] == trained["mapped"][:3]
    # Published stage 4: all of layer4 and 2048 -> 10; mapped: without the last block, but with a 2048 -> 2048 mapping.
    assert trained["lw"][3] == 14_964_736 + 2048 * 10 + 10
    assert trained["mapped"][3] == 14_964_736 - 4_462_592 + 2048 * 2048 + 2 * 2048 + 2048 * 10 + 10
    convs = {name: regime_node(plan, name, "stage2-seg2").task["experiment"]["model"]["head_convs"] for name in trained}
    assert convs == {"lw": 0, "mapped": 3}
    assert [node.regimes for node in plan.nodes if node.kind == "model"] == [("lw", "mapped", "segprop")]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"resources.slots": 7}, "all"),
        ({"resources.gflops": 3.0}, "all"),
        ({"training.checkpoint_every_s": 1.5}, "all"),
        ({"snapshots.retention": "keep"}, "all"),
        ({"run": "other", "store": "elsewhere"}, "all"),
        ({"evaluation.batch_size": 9}, {"data", "model", "train", "materialize"}),
        ({"training.epochs": 5}, {"data", "model"}),
        ({"data.views": 3}, {"data", "model"}),
        ({"model.head_convs": 2}, {"data", "model"}),
        ({"seed": 1}, {"data"}),
    ],
)
def test_a_setting_changes_the_ids_of_what_depends_on_it(tmp_path: Path, changes: dict[str, Any], kept: Any) -> None:
    # Layer-wise with mappings: as published, its head does not depend on head_convs.
    regimes = {"e2e": {}, "lw": {"variant": "mapped"}, "segprop": {}}
    before, after = small_plan(tmp_path, {"regimes": regimes}), small_plan(tmp_path, {"regimes": regimes, **changes})
    if kept == "all":
        assert [node.id for node in before.nodes] == [node.id for node in after.nodes]
    else:
        ids = {node.id for node in after.nodes}
        assert {node.kind for node in before.nodes if node.id in ids} == kept
        assert all(node.id in ids for node in before.nodes if node.kind in kept)


def test_a_moved_data_set_is_the_same_and_a_changed_one_is_not(tmp_path: Path) -> None:
    config = small_config(tmp_path, {"data": {"name": "cifar10", "path": "here", "image_size": 16}})
    moved = config.model_copy(update={"data": replace(config.data, path="there", download=True)})
    assert [node.id for node in plan_of(config).nodes] == [node.id for node in plan_of(moved).nodes]
    assert plan_of(moved).nodes[0].task["data"]["path"] == "there"
    changed = plan_of(config, replace(CIFAR, fingerprint="0" * 64))
    assert not {node.id for node in plan_of(config).nodes if node.kind != "model"} & {node.id for node in changed.nodes}


def test_adding_a_regime_changes_no_other(tmp_path: Path) -> None:
    some = small_plan(tmp_path, {"regimes": ["segprop"]})
    more = small_plan(tmp_path, {"regimes": ["e2e", "segprop", "lw"]})
    assert some.regimes["segprop"].stages == more.regimes["segprop"].stages
    assert {node.id for node in some.nodes} <= {node.id for node in more.nodes}


# -- size and weight ----------------------------------------------------------------------------------------


def test_planning_takes_time_in_proportion_to_the_nodes(tmp_path: Path) -> None:
    def seconds_a_node(views: int) -> float:
        changes = {"data.views": views, "training.epochs": views, "regimes": ["lw", "segprop"]}
        config = small_config(tmp_path, changes)
        started = time.process_time()
        plan = plan_of(config)
        took = time.process_time() - started
        assert len(plan.nodes) > 7 * views
        return took / len(plan.nodes)

    few = min(seconds_a_node(170) for _ in range(3))
    # In proportion to their square it would be ten times as long.
    assert seconds_a_node(1700) < 4 * few


def test_planning_loads_neither_torch_nor_ray_nor_pandas() -> None:
    modules = "orchestrator.plan.builder, orchestrator.execution.schedule, orchestrator.config.load"
    script = f"import sys, {modules}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "pandas", "sklearn", "torchvision"} & set(done.stdout.split())


# -- shipped configurations ---------------------------------------------------------------------------------


def test_all_shipped_configurations_are_found() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "quickstart",
        "resnet18_cifar10_cpu",
        "resnet18_cifar10",
        "resnet50_cifar10",
        "resnet50_heads",
    }


@pytest.mark.parametrize("path", IMAGE_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_plan(path: Path) -> None:
    config = load(path)
    plan = plan_of(config)
    assert list(plan.regimes) == list(config.regimes)


#: A folder that has a model's config.json, for configurations that name it on the hub.
ARCHITECTURES = {
    "smollm2_segprop": "smollm2-135m",
    "smollm2_equal_time": "smollm2-135m",
    "llama_segprop": "llama-3.1-8b",
    "llama_segprop_24gb": "llama-3.1-8b",
    "llama_segprop_12gb": "llama-3.1-8b",
    "llama_sweep": "llama-3.1-8b",
    "nemo_sweep": "mistral-nemo-12b",
    "mistral_nemo_segprop": "mistral-nemo-12b",
    "mistral_nemo_segprop_24gb": "mistral-nemo-12b",
    "llama70b_segprop": "llama-3.1-70b",
    "moe": "olmoe-1b-7b",
}


@pytest.mark.parametrize("path", TEXT_CONFIGS, ids=lambda path: path.stem)
def test_shipped_language_configurations_plan_from_a_config_json_alone(path: Path) -> None:
    folder = ARCHITECTURES.get(path.stem)
    overrides = ["data.name=stdlib", "data.path=null"]
    if folder is not None:
        overrides += [f"model.path={Path(__file__).parents[3] / 'data' / folder}", "model.revision=null"]
    prepared = prepare(path, overrides)
    assert list(prepared.plan.regimes) == list(prepared.config.regimes)


def test_the_smaller_the_pieces_of_a_base_the_less_its_largest_stage_needs() -> None:
    folder = Path(__file__).parents[3] / "data" / "llama-3.1-8b"
    own = [f"model.path={folder}", "model.revision=null", "data.name=stdlib", "data.path=null"]
    llama = next(path for path in TEXT_CONFIGS if path.stem == "llama_segprop")
    peaks = {}
    for size in ("null", "9", "3", "1"):
        plan = prepare(llama, [*own, f"split.base_segment_size={size}"]).plan
        estimates = [plan.node(stage).estimate for stage in plan.regimes["segprop"].stages]
        peaks[size] = max(estimate.peak_bytes for estimate in estimates)
    assert peaks["null"] > 1.2 * peaks["9"] > 1.2 * peaks["3"] > 1.2 * peaks["1"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_say_how_to_run_them_and_what_they_cost(path: Path) -> None:
    comment = path.read_text().split("\n\n")[0]
    command = "segprop sweep" if path.stem.endswith("_sweep") else "python -m orchestrator.run"
    assert f"{command} configs/{path.name}" in comment
    assert "Expected cost" in comment
    assert all(line.startswith("#") for line in comment.splitlines())


@pytest.mark.parametrize("name", ["resnet18_cifar10", "resnet50_cifar10", "resnet50_heads"])
def test_published_settings_are_to_the_letter(name: str) -> None:
    config = load(next(path for path in CONFIGS if path.stem == name))
    training, data = config.training, config.data
    assert (training.epochs, training.batch_size, training.schedule.name) == (400, 256, "constant")
    optimizer = training.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.weight_decay) == (
        "adamw",
        3e-4,
        (0.9, 0.999),
        0.01,
    )
    assert (data.image_size, data.resize, data.augment, data.flip, data.views) == (
        224,
        256,
        "paper",
        True,
        400,
    )
    assert (config.model.classifier, config.model.hidden, config.model.dropout) == ("mlp", 512, 0.3)
    assert training.precision == "fp16"
    convs = {regime: config.regime(regime).model.head_convs for regime in config.regimes}
    assert convs.pop("lw", 0) == 0, "layer-wise, the last stage trains the classifier alone"
    assert set(convs.values()) == {"resnet18_cifar10": {1}, "resnet50_cifar10": {3}}.get(name, {1, 2, 3})
    assert config.evaluation.every == "epoch", "Test (real) and Test (aux) are reported for each epoch"


@pytest.mark.parametrize(
    ("name", "bases"), [("llama_sweep", [1, 18, 21, 24]), ("nemo_sweep", [1, 18, 25, 32])], ids=["llama", "nemo"]
)
def test_sweeps_have_the_base_depths_of_the_published_table(name: str, bases: list[int]) -> None:
    path = next(path for path in CONFIGS if path.stem == name)
    folder = Path(__file__).parents[3] / "data" / ARCHITECTURES[name]
    sweep = load(path, [f"model.path={folder}", "data.name=stdlib", "data.path=null"]).sweep
    assert sweep is not None
    assert list(sweep.parameters["split.base"].grid or ()) == bases
    text = path.read_text()
    assert all(f"#   base {base} " in text for base in bases), "with the published scores of each"
