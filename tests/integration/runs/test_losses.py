"""Networks whose targets are no classes: three regimes of them, beside a loop in plain PyTorch and scikit-learn."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from other_losses import write
from running import Lab, StopAfter, digests, summary_of
from sklearn.metrics import f1_score, r2_score
from torch import Tensor
from torch.nn import functional as F

import segprop
from cache_store.errors import ConfigError, Interrupted
from cache_store.snapshots.store import SnapshotStore
from orchestrator.cli import main
from orchestrator.runs.prepare import prepare
from workers.data.images.source import ImageSource
from workers.domains.metrics import METRICS
from workers.environment import prepare_process
from workers.models.python.building import build
from workers.seeds import derive_seed
from workers.specs import as_json
from workers.specs.data_results import ImageDataResult
from workers.specs.tasks import StageTask
from workers.training import clocks
from workers.training.shuffle import epoch_order

Loss = Callable[[Tensor, Tensor], Tensor]
LABELS = {"training.loss": {"name": "multi_label"}, "data.args": {"kind": "labels"}}
CASES: dict[str, tuple[dict[str, Any], Loss]] = {
    "labels": (LABELS, F.binary_cross_entropy_with_logits),
    "numbers": ({}, F.mse_loss),
    "one number": (
        {
            "training.loss": {"name": "huber", "delta": 0.5},
            "data.args": {"kind": "scalar"},
            "model.args": {"outputs": 1},
        },
        lambda output, targets: F.huber_loss(output, targets, delta=0.5),
    ),
    "a loss of one's own": (
        {"training.loss": {"name": "python", "build": "mine:power", "args": {"exponent": 1.2}}, "data.classes": 3},
        lambda output, targets: (output - targets).abs().pow(1.2).mean(),
    ),
    "classes under a loss of one's own": (
        {
            "training.loss": {"name": "python", "build": "mine:focal"},
            "data.targets": "classes",
            "data.args": {"kind": "classes"},
        },
        lambda output, targets: focal(output, targets),
    ),
}


def focal(output: Tensor, targets: Tensor) -> Tensor:
    logs = output.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return -((1 - logs.exp()) ** 2 * logs).mean()


def plain_loop(lab: Lab, loss: Loss) -> dict[str, Tensor]:
    """What an ordinary loop makes of the network, given the same order of samples."""
    task = as_json.from_json(StageTask, lab.node("e2e/e2e").task)
    train, seed = task.train, task.experiment.seed
    rows = ImageSource(task.experiment, lab.commit("data").read(ImageDataResult), SnapshotStore(lab.storage), "train")
    prepare_process(torch.device("cpu"), 1, deterministic=True)
    network = build(task.experiment.model, seed).train()  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=train.optimizer.lr, weight_decay=train.optimizer.weight_decay, fused=True
    )
    torch.manual_seed(derive_seed(seed, "stage", task.name))
    for epoch in range(train.epochs):
        order = epoch_order(seed, epoch, rows.rows)
        for start in range(0, rows.rows - train.batch_size + 1, train.batch_size):
            chosen = order[start : start + train.batch_size]
            loss(network(rows.batch(chosen, 0)), rows.labels[torch.from_numpy(chosen)]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_e2e_equals_a_plain_loop_to_the_bit(tmp_path: Path, case: str) -> None:
    changes, loss = CASES[case]
    lab = Lab(prepare(write(tmp_path, {**changes, "regimes": ["e2e"], "training.commit": "last"})))
    lab.run("e2e/e2e")
    trained = {name.partition("/")[2]: tensor for name, tensor in lab.weights("e2e/e2e").items()}
    expected = plain_loop(lab, loss)
    assert trained.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(trained[name], expected[name])] == []


@pytest.mark.parametrize(
    ("changes", "metric", "score"),
    [
        ({}, "r2", lambda true, said: r2_score(true, said)),
        (LABELS, "f1_micro", lambda true, said: f1_score(true, said >= 0, average="micro")),
    ],
    ids=["numbers", "labels"],
)
def test_every_regime_trains_and_what_is_loaded_scores_as_the_run_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], metric: str, score: Any
) -> None:
    config = write(tmp_path, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    summary = summary_of(tmp_path / "run")
    kind = changes.get("data.args", {"kind": "numbers"})["kind"]
    test = runpy.run_path(str(tmp_path / "mine.py"))["splits"](kind)["test"]
    assert summary["regimes"].keys() == {"e2e", "lw", "segprop"}
    for name, regime in summary["regimes"].items():
        with torch.inference_mode():
            said = segprop.load(tmp_path / "run", name)(test.x)
        assert regime["final"]["metrics"][metric] == pytest.approx(score(test.y.numpy(), said.numpy()), abs=1e-5)
        assert "accuracy" not in regime["final"]["metrics"]
        for stage in regime["stages"]:
            curve = [epoch["validation"][metric] for epoch in stage["curve"]]
            assert stage["best_epoch"] == curve.index(max(curve))
            assert stage["metrics"][f"validation_{metric}"] == max(curve)
    assert "F1" in capsys.readouterr().out if metric == "f1_micro" else "R²" in capsys.readouterr().out
    card = (tmp_path / "run" / "model" / "e2e" / "README.md").read_text()
    assert f"| loss | {METRICS[metric].title} |" in card
    assert ("| Loss | mse |" in card) == (metric == "r2")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "accuracy" not in page.lower()
    assert f"segprop-2-validation-{metric}" in page


def test_a_stage_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    straight, stopped = (tmp_path / name for name in ("straight", "stopped"))
    for folder in (straight, stopped):
        folder.mkdir()
    label = "segprop/stage2-b"
    changes = {"regimes": ["segprop"], "data.args": {"kind": "labels"}, "training.loss": {"name": "multi_label"}}
    lab = Lab(prepare(write(straight, changes)))
    lab.run(label)
    again = Lab(prepare(write(stopped, changes)))
    again.prepare(label)
    with pytest.raises(Interrupted):
        again.run(label, StopAfter(4))
    again.run(label)
    assert again.commit(label).result["resumed"] == 1
    assert digests(again.commit(label)) == digests(lab.commit(label))


def test_a_block_that_the_loss_does_not_reach_is_named_at_the_first_step(tmp_path: Path) -> None:
    config = write(tmp_path, {"regimes": ["e2e"], "model.build": "cut:net"})
    source = (tmp_path / "mine.py").read_text() + (
        "\nclass Cut(nn.Module):\n    def forward(self, x): return x.detach()\n"
        "def net(outputs=3):\n    blocks = {'a': nn.Linear(6, 8), 'b': nn.Sequential(Cut(), nn.Linear(8, 8))}\n"
        "    return segprop.Chain(blocks, nn.Linear(8, outputs))\n"
    )
    (tmp_path / "cut.py").write_text(source)
    lab = Lab(prepare(config))
    with pytest.raises(ConfigError, match="e2e: the loss gives no gradient to a: "):
        lab.run("e2e/e2e")
