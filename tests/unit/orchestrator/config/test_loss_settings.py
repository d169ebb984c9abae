"""What a configuration may say of its loss and targets, and what that changes of the nodes of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from other_losses import write
from planning import plan_of

from cache_store.errors import UserError
from cache_store.keys import digest_json
from orchestrator.config.load import load
from orchestrator.runs.prepare import prepare

ROOT = Path(__file__).parents[4]
OWN = {"name": "python", "build": "mine:power"}


@pytest.mark.parametrize(
    ("name", "digest"),
    # Written before there was a choice of losses. What changes all ids on purpose (`plan.graph.FORMAT`) changes these.
    [("quickstart", "f5d55d5d5bc7b0f5f239f7b386bcde29"), ("resnet50_cifar10", "c53f34de89727e42bfc9880fa96ef48d")],
)
def test_nodes_of_shipped_configurations_are_those_of_before(name: str, digest: str) -> None:
    plan = plan_of(load(ROOT / "configs" / f"{name}.yaml"))
    assert digest_json(sorted(node.id for node in plan.nodes)) == digest


def ids(folder: Path, changes: dict[str, Any] | None = None) -> dict[str, str]:
    return {node.label: node.id for node in prepare(write(folder, changes)).plan.nodes}


def test_cross_entropy_and_classes_written_out_are_what_nothing_said_is(tmp_path: Path) -> None:
    classes = {"training.loss": None, "data.args": {"kind": "classes"}}
    plain = ids(tmp_path, classes)
    assert ids(tmp_path, {**classes, "training.loss": {"name": "cross_entropy"}, "data.targets": "classes"}) == plain


def test_another_loss_trains_anew_on_the_same_data_and_initial_weights(tmp_path: Path) -> None:
    mse, huber = ids(tmp_path), ids(tmp_path, {"training.loss": {"name": "huber"}})
    same = {label for label in mse if mse[label] == huber[label]}
    assert {"data", "model"} <= same
    assert not [label for label in same if "test" in label or label == "e2e/e2e"]


def test_the_source_of_a_loss_is_part_of_what_is_trained_with_it(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text("def own(output, targets): return (output - targets).abs().mean()")
    own = {"training.loss": {"name": "python", "build": "losses:own"}, "data.targets": "numbers"}
    before = ids(tmp_path, own)
    (tmp_path / "losses.py").write_text("def own(output, targets): return (output - targets).abs().sum(1).mean()")
    after = ids(tmp_path, own)
    assert [before[label] for label in ("data", "model")] == [after[label] for label in ("data", "model")]
    assert before["e2e/e2e"] != after["e2e/e2e"]
    prepared = prepare(write(tmp_path, own))
    loss = prepared.plan.node(after["e2e/e2e"]).task["experiment"]["loss"]
    assert (loss["build"], len(loss["code"])) == ("losses:own", 64)
    assert "loss" not in prepared.plan.node(after["e2e/e2e"]).task["train"]


def test_a_resolved_configuration_says_what_targets_are_and_is_read_again(tmp_path: Path) -> None:
    config = prepare(write(tmp_path)).config
    resolved = config.resolved()
    assert resolved["data"]["targets"] == "numbers"
    assert resolved["training"]["loss"] == {"name": "mse"}
    assert config.domain.metrics(config.data) == ("r2", "rmse", "mae", "loss")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"training.loss": "mse"}, ["training.loss: mse: must be a section .* write {name: mse}"]),
        ({"training.loss.name": "mean"}, ["training.loss.name"]),
        ({"training.loss.delta": 2.0}, ["training.loss.delta: is for training.loss.name huber, this is mse"]),
        ({"training.label_smoothing": 0.1}, ["training.label_smoothing: 0.1: is for cross_entropy, the loss is mse"]),
        ({"training.loss": None}, ["sample 0 of train is .*allowed: a class.*set training.loss"]),
        ({"data.targets": "labels"}, ["data.targets: labels: mse does not take them; .*multi_label, python"]),
        ({"training.loss.name": "multi_label"}, ["allowed: an array .labels.. of values from 0 to 1"]),
        ({"model.args": {"outputs": 2}}, ["model: the head gives 2 outputs, a target has 3 numbers"]),
        ({"model.args": {"outputs": 4}}, ["model: the head gives 4 outputs, a target has 3 numbers"]),
        ({"data.classes": 2}, ["data.classes: 2, but a target has 3 numbers"]),
        ({"training.loss": {"name": "python"}}, ["training.loss.build: none given for python"]),
        ({"training.loss": OWN}, ["data.classes: none given"]),
        ({"training.loss": OWN, "data.classes": 2}, ["data.classes: 2: the head gives 3 outputs; allowed: 3"]),
        (
            {"training.loss": OWN, "data.classes": 3, "training.exit": {"target": 0.5}},
            ["training.exit.target: 0.5: targets that are taken as they are have no score"],
        ),
        (
            {"training.loss": {"name": "python", "build": "mine:pwer"}, "data.targets": "numbers"},
            ["training.loss.build: mine has no function 'pwer'; did you mean 'power'"],
        ),
        (
            {"training.loss": {"name": "python", "build": "mynets:power"}, "data.targets": "numbers"},
            ["training.loss.build: 'mynets:power': there is no module"],
        ),
        (
            {"training.loss": {**OWN, "code": "0" * 64}, "data.targets": "numbers"},
            ["training.loss.code: the source of mine .* not 0000"],
        ),
        (
            {"training.loss": {**OWN, "args": {"exp": 2}}, "data.targets": "numbers"},
            ["training.loss.build: mine:power failed: TypeError"],
        ),
        (
            {"training.loss": {"name": "python", "build": "mine:rows"}, "data.targets": "numbers"},
            [r"training.loss.build: mine:rows returned torch.float32 \(2, 3\); allowed: one number"],
        ),
        (
            {"training.loss": {"name": "python", "build": "mine:rounded"}, "data.targets": "numbers"},
            ["training.loss.build: mine:rounded gives no gradient"],
        ),
        (
            {"regimes": {"e2e": {"training": {"loss": {"name": "huber"}}}}},
            ["regimes.e2e.training.loss: all regimes and stages train with the same loss"],
        ),
        (
            {"regimes": {"segprop": {"training": {"label_smoothing": 0.1}}}},
            ["regimes.segprop.training.label_smoothing: 0.1: is for cross_entropy"],
        ),
        (
            {"evaluation": {"boundaries": {}}},
            ["evaluation.boundaries: is for images with classes, and data.targets is numbers"],
        ),
        (
            {"split": {"intermediate": "frozen"}, "run_exit": {"accuracy": 0.9}},
            ["run_exit.accuracy: 0.9: these targets have no accuracy, but r2, rmse, mae, loss"],
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    tmp_path: Path, changes: dict[str, Any], messages: list[str]
) -> None:
    for message in messages:
        with pytest.raises(UserError, match=message):
            prepare(write(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.loss": {"name": "mse"}},
            "training.loss.name: mse: the targets of digits are classes; allowed: cro",
        ),
        ({"data.targets": "numbers"}, "data.targets: is for data.name python; digits has none"),
    ],
)
def test_known_data_sets_have_classes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from planning import small_config

    with pytest.raises(UserError, match=message):
        small_config(tmp_path, changes)


def test_a_language_model_has_its_own_loss() -> None:
    with pytest.raises(UserError, match="is for images and data of your own"):
        load(ROOT / "configs" / "lm_quickstart.yaml", ["training.loss.name=mse"])
