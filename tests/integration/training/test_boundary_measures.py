"""What boundaries know, of a small run in three regimes, against the exported networks run and measured by hand."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from running import summary_of, write_config
from torch import Tensor, nn
from torch.nn import functional as F

from cache_store.records.nodes import NodeStore
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.plan.graph import Node
from orchestrator.reports.record_json import from_json
from orchestrator.reports.records import Summary
from orchestrator.reports.sections import BoundarySection, boundaries_of, known_after
from orchestrator.runs.prepare import Prepared, prepare
from workers.control import ThreadControl
from workers.data.images.source import ImageSource
from workers.data.splits import permutation
from workers.specs import as_json
from workers.specs.data_results import ImageDataResult
from workers.specs.orders import WorkOrder
from workers.specs.tasks import BoundariesTask
from workers.tasks.execute import execute

SAMPLES, HELD_OUT, BLOCK = 96, 48, 24
CHANGES = {
    "regimes": ["lw", "segprop", "e2e"],
    "training.epochs": 1,
    "snapshots.mode": "always",
    "snapshots.retention": "keep",
    "evaluation.boundaries": {"samples": SAMPLES},
}


@dataclass(frozen=True)
class Finished:
    config: Path
    prepared: Prepared

    @property
    def run_dir(self) -> Path:
        return self.prepared.run_dir

    @property
    def nodes(self) -> NodeStore:
        return NodeStore(open_storage(self.prepared.config.store))

    def measured(self) -> list[Node]:
        return [node for node in self.prepared.plan.nodes if node.kind == "boundaries"]

    def known(self) -> dict[str, dict[str, BoundarySection]]:
        """Regime -> what its boundaries know in the end."""
        summary = from_json(Summary, summary_of(self.run_dir))
        found = {name: known_after(boundaries_of(regime)) for name, regime in summary.regimes.items()}
        return {name: list(stages.values())[-1] for name, stages in found.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    config = write_config(tmp_path_factory.mktemp("known"), CHANGES)
    assert main(["run", str(config), "--quiet"]) == 0
    return Finished(config, prepare(config))


def test_figures_are_those_of_the_exported_networks_measured_by_hand(finished: Finished) -> None:
    train, held_out = drawn(finished, "train", 0, SAMPLES), drawn(finished, "validation", None, HELD_OUT)
    seen = {name: activations(finished, name, train[0]) for name in ("e2e", "lw", "segprop")}
    inputs = F.adaptive_avg_pool2d(train[0], 8).flatten(1)
    one_hot = F.one_hot(train[1], 10).float()
    for name, known in finished.known().items():
        assert list(known) == ["seg1", "seg2", "seg3", "seg4"]
        tested = activations(finished, name, held_out[0])
        for block, found in known.items():
            own = seen[name][block]
            expected = {
                "nhsic_inputs": np.mean([by_the_source(own[cut], inputs[cut]) for cut in cuts()]),
                "nhsic_targets": np.mean([by_the_source(own[cut], one_hot[cut]) for cut in cuts()]),
                "probe": probe(own, one_hot, tested[block], held_out[1]),
                "effective_rank": rank(own),
            }
            if name != "e2e":
                expected["cka"] = debiased_cka(own, seen["e2e"][block])
            assert found.width == own.shape[1]
            assert {key: item.value for key, item in found.measures.items()} == {
                # A prediction may fall to the other side of a tie.
                key: pytest.approx(value, rel=2e-3, abs=1.01 / HELD_OUT if key == "probe" else 1e-6)
                for key, value in expected.items()
            }


def test_boundaries_that_are_stored_are_read_and_what_is_lost_is_computed(finished: Finished) -> None:
    nodes, snapshots = finished.nodes, SnapshotStore(open_storage(finished.prepared.config.store))
    before = {node.label: nodes.commit_of(node.id).result for node in finished.measured()}  # type: ignore[union-attr]
    for node in finished.measured():
        result = before[node.label]
        # Both splits; the network trained end to end has no snapshots.
        expected = (SAMPLES + HELD_OUT, 0) if "stored" in node.task else (0, SAMPLES + HELD_OUT)
        assert (result["read"], result["ran"]) == expected, node.label
        assert (result["snapshot"]["bytes_read"] > 0) is ("stored" in node.task)
        assert result["snapshot"]["bytes_written"] == 0
    assert sum("stored" in node.task for node in finished.measured()) == 8
    again = next(node for node in finished.measured() if node.label == "segprop/boundaries after stage3-seg3")
    sets = [info.id for info in snapshots.list() if info.key.get("kind") == "boundary"]
    for set_id in sets:
        snapshots.drop(set_id)
    (Path(finished.prepared.config.store) / "nodes" / again.id / "commit.json").unlink()
    assert main(["run", str(finished.config), "--quiet"]) == 0
    found = nodes.commit_of(again.id)
    assert found is not None
    assert (found.result["read"], found.result["ran"]) == (0, SAMPLES + HELD_OUT)
    # Nothing was stored for it.
    assert not any(info.id in sets for info in snapshots.list())
    for name, boundary in before[again.label]["boundaries"].items():
        for figure, item in boundary["measures"].items():
            now = found.result["boundaries"][name]["measures"][figure]["value"]
            assert now == pytest.approx(item["value"], rel=1e-3, abs=1.01 / HELD_OUT if figure == "probe" else 0)


def test_without_probes_nothing_of_validation_is_looked_at(finished: Finished) -> None:
    before = {node.label: node for node in finished.measured()}["segprop/boundaries after stage4-seg4"]
    overrides = ('evaluation.boundaries={"measures": ["nhsic", "effective_rank"], "samples": 96}',)
    plan = prepare(finished.config, overrides).plan
    node = next(node for node in plan.nodes if node.label == before.label)
    nodes = finished.nodes
    parents = {role: nodes.commit_of(parent) for role, parent in node.parents.items()}
    order = WorkOrder(node.id, node.kind, node.task, parents, finished.prepared.config.store, "cpu", 1)  # type: ignore[arg-type]
    found, full = execute(order, ThreadControl()), nodes.commit_of(before.id)
    assert found is not None
    assert full is not None
    assert (found.result["held_out"], found.result["read"] + found.result["ran"]) == (0, SAMPLES)
    own, all_of_it = (each.result["boundaries"]["seg4"]["measures"] for each in (found, full))
    assert set(own) == {"nhsic_inputs", "nhsic_targets", "effective_rank"}
    assert all(own[name]["value"] == pytest.approx(all_of_it[name]["value"], rel=1e-3) for name in own)


def test_the_report_shows_them(finished: Finished) -> None:
    page = (finished.run_dir / "report.html").read_text()
    for words in ("What boundaries know", "nHSIC with targets", "96 training samples in blocks of 24", 'id="plane-'):
        assert words in page, words


def drawn(finished: Finished, split: str, view: int | None, count: int) -> tuple[Tensor, Tensor]:
    """The images that are measured, in their order, and their classes."""
    plan = finished.prepared.plan
    data = finished.nodes.commit_of(next(node.id for node in plan.nodes if node.prepares))
    assert data is not None
    task = as_json.from_json(BoundariesTask, finished.measured()[0].task)
    store = SnapshotStore(open_storage(finished.prepared.config.store))
    source = ImageSource(task.experiment, data.read(ImageDataResult), store, split)
    index = permutation(source.rows, task.experiment.seed, "boundaries")[:count]
    return source.batch(index, view), source.labels[torch.from_numpy(index)]


def activations(finished: Finished, regime: str, images: Tensor) -> dict[str, Tensor]:
    """What the exported network computes at its boundaries, averaged over a grid by hand."""
    model: nn.Module = runpy.run_path(str(finished.run_dir / "model" / regime / "load_model.py"))["load"]()
    last, caught = model.layer4[1], dict[str, Tensor]()

    def keep(name: str, value: Tensor) -> None:
        caught[name] = value.detach().clone()

    for number in (1, 2, 3, 4):
        layer = getattr(model, f"layer{number}")
        layer.register_forward_hook(lambda _, __, output, name=f"seg{number}": keep(name, output))
    last.register_forward_pre_hook(lambda _, given: keep("identity", given[0]))
    last.conv2.register_forward_pre_hook(lambda _, given: keep("path", given[0]))
    with torch.no_grad():
        model.eval()(images)
    # At 8 x 8: 64 x 8 x 8, 128 x 4 x 4, 256 x 2 x 2, 512 x 1 x 1.
    found = {
        "seg1": F.avg_pool2d(caught["seg1"], 2).flatten(1),
        "seg2": F.adaptive_avg_pool2d(caught["seg2"], 2).flatten(1),
        "seg3": caught["seg3"].flatten(1),
        "seg4": torch.cat([caught["identity"].flatten(1), caught["path"].flatten(1)], dim=1),
    }
    # LW's own network is cut before pooling.
    return {**found, "seg4": caught["seg4"].flatten(1)} if regime == "lw" else found


def cuts() -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, SAMPLES, BLOCK)]


def by_the_source(one: Tensor, other: Tensor) -> float:
    """As its published formula says, with an inverse."""

    def own(samples: np.ndarray) -> np.ndarray:
        size, width = samples.shape
        squared = ((samples[:, None] - samples[None]) ** 2).sum(axis=2)
        kernel = np.exp(-squared / (2 * 5.0**2 * width)) @ (np.eye(size) - 1 / size)
        return kernel @ np.linalg.inv(kernel + 1e-5 * size * np.eye(size))

    first, second = own(one.double().numpy()), own(other.double().numpy())
    return float((first * second.T).sum())


def debiased_cka(one: Tensor, other: Tensor) -> float:
    def criterion(first: np.ndarray, second: np.ndarray) -> float:
        size = len(first)
        k, q = (features @ features.T * (1 - np.eye(size)) for features in (first, second))
        ones = np.ones(size)
        total = np.trace(k @ q) + (ones @ k @ ones) * (ones @ q @ ones) / ((size - 1) * (size - 2))
        return float(total - 2 / (size - 2) * (ones @ k @ q @ ones)) / (size * (size - 3))

    blocks = [(one[cut].double().numpy(), other[cut].double().numpy()) for cut in cuts()]
    both, own, theirs = (sum(criterion(b[i], b[j]) for b in blocks) for i, j in ((0, 1), (0, 0), (1, 1)))
    return both / float(np.sqrt(own * theirs))


def probe(fitted: Tensor, one_hot: Tensor, tested: Tensor, true: Tensor) -> float:
    mean, scale = fitted.double().mean(dim=0), fitted.double().std(dim=0, correction=0)
    scale[scale == 0] = 1
    wide, base = (fitted.double() - mean) / scale, one_hot.double().mean(dim=0)
    below = torch.cat([wide, (1e-3 * len(wide)) ** 0.5 * torch.eye(wide.shape[1], dtype=torch.float64)])
    targets = torch.cat([one_hot.double() - base, torch.zeros(wide.shape[1], 10, dtype=torch.float64)])
    weights = torch.linalg.lstsq(below, targets).solution
    said = (((tested.double() - mean) / scale) @ weights + base).argmax(dim=1)
    return float((said == true).double().mean())


def rank(samples: Tensor) -> float:
    values = np.linalg.svd((samples.double() - samples.double().mean(dim=0)).numpy(), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 1e-7]
    return float(np.exp(-(shares * np.log(shares)).sum()))
