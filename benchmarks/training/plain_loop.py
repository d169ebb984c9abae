"""SegProp's stages as one would write them by hand: one process, one script, tensors in memory.

    python -m benchmarks.training.plain_loop SETTINGS.json

The yardstick for `overhead`: the same parts, initial weights, batches, optimizer, precision and validation as the
orchestrated run, in the same order and from the same seeds, but no plan, no store, no checkpoints, no workers:
both end with the same weights. Frozen activations are kept as tensors. Prints one JSON line: when the first step
began, when the last weights were saved, each stage's epochs.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from workers.data.images.prepare import prepare
from workers.data.images.source import ImageSource
from workers.models.resnet import parts as resnet
from workers.seeds import derive_seed
from workers.specs.as_json import from_json
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec
from workers.training.shuffle import epoch_order, order_seed

Tensors = tuple[Tensor, ...]


@dataclass
class Rows:
    """One split as a stage sees it: `load(rows, view)` gives the input of a batch."""

    load: Callable[[np.ndarray, int | None], Tensors]
    labels: Tensor


class Plain:
    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings = settings
        self.experiment = from_json(Experiment, settings["experiment"])
        assert isinstance(self.experiment.model, ResNetSpec)
        assert isinstance(self.experiment.data, ImageSpec)
        self.model = self.experiment.model
        self.size, self.classes = self.experiment.data.image_size, self.experiment.classes
        self.folder = folder
        torch.set_num_threads(settings["threads"])
        torch.use_deterministic_algorithms(True)  # the default of a stage: the same work, bit for bit
        cast("Any", torch.utils.deterministic).fill_uninitialized_memory = False
        snapshots = SnapshotStore(open_storage(str(folder / "data")))
        data = prepare(from_json(ImageSpec, settings["data"]), snapshots)
        self.images = {
            split: ImageSource(self.experiment, data, snapshots, split) for split in ("train", "validation", "test")
        }
        self.initial = resnet.initial_state(self.model, self.classes, self.experiment.seed)
        *self.blocks, self.head = resnet.part_names(self.model, self.size, self.classes)

    def part(self, name: str) -> nn.Module:
        part = resnet.build_part(self.model, self.size, self.classes, name)
        part.load_state_dict({key: self.initial[key] for key in part.state_dict()})
        return part.to(memory_format=torch.channels_last)

    def run(self) -> dict[str, Any]:
        first_step = time.time()
        stages = []
        rows = {split: _of_images(images) for split, images in self.images.items()}
        finished: list[nn.Module] = []
        head = self.part(self.head)
        for index, (name, stage) in enumerate(zip(self.blocks, self.settings["stages"], strict=True)):
            torch.manual_seed(derive_seed(self.experiment.seed, "stage", stage))
            block = self.part(name)
            parts: list[nn.Module] = [block]
            if index + 1 < len(self.blocks):
                n = len(self.blocks)
                seed = derive_seed(self.experiment.seed, "adapter", stage)
                adapter = resnet.build_adapter(self.model, self.size, self.classes, index + 1, n, seed)
                parts.append(adapter.to(memory_format=torch.channels_last))
            path = nn.Sequential(*parts, head)
            stages.append(self.train(stage if index else None, path, rows))
            torch.save({"block": block.state_dict(), "head": head.state_dict()}, self.folder / f"{name}.pt")
            finished.append(block)
            if index + 1 < len(self.blocks):
                rows = {split: self.roll(block, rows[split], split) for split in ("train", "validation")}
        whole = nn.Sequential(*finished, head)
        scores = {
            split: self.score(whole, _of_images(self.images[split]), self.settings["eval"])
            for split in ("validation", "test")
        }
        return {"first_step": first_step, "finished": time.time(), "stages": stages, "scores": scores}

    def train(self, stage: str | None, path: nn.Module, rows: dict[str, Rows]) -> dict[str, Any]:
        """Train the path; the best epoch's weights stay in it."""
        settings = self.settings
        optimizer = torch.optim.AdamW(path.parameters(), lr=settings["lr"], weight_decay=0.01, fused=True)
        batch, epochs = settings["batch_size"], settings["epochs"]
        train = rows["train"]
        count = len(train.labels)
        steps = max(1, count // batch)
        best: tuple[tuple[float, float], dict[str, Tensor]] | None = None
        history = []
        began = time.monotonic()
        for epoch in range(epochs):
            path.train()
            order = epoch_order(order_seed(self.experiment.seed, stage), epoch, count)
            total = torch.zeros(())
            for step in range(steps):
                index = order[step * batch : (step + 1) * batch]
                done = (epoch * steps + step) / (epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = settings["lr"] * 0.5 * (1 + math.cos(math.pi * done))
                inputs = _channels_last(train.load(index, epoch % settings["views"]))
                with torch.autocast("cpu", torch.bfloat16):
                    logits = path(inputs)
                loss = F.cross_entropy(logits.float(), train.labels[torch.from_numpy(index)])
                torch.autograd.backward(loss)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.detach()
            accuracy, validation_loss = self.score(path, rows["validation"], batch)
            history.append({"loss": total.item() / steps, "validation_accuracy": accuracy})
            if best is None or (accuracy, -validation_loss) > best[0]:
                state = {key: value.clone() for key, value in path.state_dict().items()}
                best = ((accuracy, -validation_loss), state)
        assert best is not None
        path.load_state_dict(best[1])
        return {"seconds": time.monotonic() - began, "epochs": history}

    @torch.no_grad()
    def score(self, path: nn.Module, rows: Rows, batch: int) -> tuple[float, float]:
        """(accuracy, mean loss) of the path in eval mode."""
        path.eval()
        correct, loss = 0, 0.0
        for index, inputs in _in_order(rows, None, batch):
            with torch.autocast("cpu", torch.bfloat16):
                logits = path(_channels_last(inputs))
            labels = rows.labels[index]
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits.float(), labels)) * len(labels)
        return correct / len(rows.labels), loss / len(rows.labels)

    @torch.no_grad()
    def roll(self, block: nn.Module, rows: Rows, split: str) -> Rows:
        """The rows one block further, every view, kept in memory as bfloat16."""
        block.eval()
        used = min(self.settings["views"], self.settings["epochs"])
        views: list[int | None] = list(range(used)) if split == "train" else [None]
        kept: dict[int | None, Tensors] = {}
        for view in views:
            outputs = []
            for _, inputs in _in_order(rows, view, self.settings["group_rows"]):
                with torch.autocast("cpu", torch.bfloat16):
                    outputs.append(block(_channels_last(inputs)))
            kept[view] = tuple(torch.cat(column).bfloat16() for column in zip(*outputs, strict=True))
        return Rows(lambda index, view: tuple(t[torch.from_numpy(index)] for t in kept[view]), rows.labels)


def _of_images(images: ImageSource) -> Rows:
    return Rows(lambda rows, view: (images.batch(rows, view),), images.labels)


def _in_order(rows: Rows, view: int | None, batch: int) -> Iterator[tuple[slice, Tensors]]:
    for start in range(0, len(rows.labels), batch):
        stop = min(start + batch, len(rows.labels))
        yield slice(start, stop), rows.load(np.arange(start, stop), view)


def _channels_last(tensors: Tensors) -> Tensors:
    return tuple(tensor.to(memory_format=torch.channels_last) for tensor in tensors)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(json.dumps(Plain(json.loads(source.read_text()), source.parent).run()))
