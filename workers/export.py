"""The outcome of a regime as an ordinary checkpoint: safetensors that torchvision loads with `strict=True`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_store.records.nodes import Commit, NodeStore
from cache_store.storage.durable import write_atomically
from workers.specs.experiment import Experiment, ResNetSpec
from workers.specs.results import ModelResult

_LOADING = '''"""Rebuild this model with torchvision alone: `model = load()`."""

from pathlib import Path

import torchvision
from safetensors.torch import load_file
from torch import nn


def load():
    here = Path(__file__).parent
    model = torchvision.models.{name}(num_classes={classes})
{stem}{classifier}    model.load_state_dict(load_file(here / "model.safetensors"), strict=True)
    return model.eval()
'''
_STEM = (
    "    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)\n"
    "    model.maxpool = nn.Identity()\n"
)
_CLASSIFIER = (
    "    features = model.fc.in_features\n"
    "    model.fc = nn.Sequential(\n"
    "        nn.Linear(features, {hidden}), nn.ReLU(), nn.Dropout({dropout}), nn.Linear({hidden}, {classes})\n"
    "    )\n"
)


def export(
    experiment: Experiment,
    parts: Mapping[str, Commit],
    nodes: NodeStore,
    target: Path,
    *,
    class_names: tuple[str, ...] = (),
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model.safetensors`, `model.json` and `load_model.py` into `target`; returns the weights' path.

    `parts` maps every part of the chain to the commit that holds it. Nothing is written when `target` already
    holds these very commits, and torch is then not even imported.
    """
    sources = {name: [commit.node, commit.attempt] for name, commit in parts.items()}
    weights_path, facts_path = target / "model.safetensors", target / "model.json"
    written = weights_path.exists() and facts_path.exists()
    if written and json.loads(facts_path.read_text()).get("sources") == sources:
        return weights_path
    import torch
    from safetensors.torch import save

    from workers.domains.registry import domain_of
    from workers.weights import Weights

    commits = {f"weights/{name}": commit for name, commit in parts.items()}
    weights = Weights(nodes, commits, domain_of(experiment), torch.device("cpu"))
    state = {name: tensor for part in parts for name, tensor in weights.state(part).items()}
    model = experiment.model
    assert isinstance(model, ResNetSpec)
    target.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": asdict(model),
        "classes": experiment.classes,
        "class_names": list(class_names),
        "preprocessing": dict(preprocessing or {}),
        "sources": sources,
    }
    loading = _LOADING.format(
        name=model.name,
        classes=experiment.classes,
        stem=_STEM if model.stem == "small" else "",
        classifier=_CLASSIFIER.format(hidden=model.hidden, dropout=model.dropout, classes=experiment.classes)
        if model.classifier == "mlp"
        else "",
    )
    write_atomically(weights_path, save(state, metadata={"format": "pt", "model": model.name}))
    write_atomically(target / "load_model.py", loading.encode())
    write_atomically(facts_path, (json.dumps(facts, indent=2) + "\n").encode())
    return weights_path


FACTS = "segprop.json"
#: Files beside a language model's weights (tokenizer, generation settings) are committed under names that begin so.
COMPANION = "companion-"


def export_language_model(
    experiment: Experiment,
    parts: Mapping[str, Commit],
    model_commit: Commit,
    nodes: NodeStore,
    target: Path,
) -> None:
    """Write the folder, one part in memory at a time. `parts` maps every part to the commit that holds it;
    `model_commit`: the import's, with tokenizer and settings. Nothing is done, and torch is not imported, when `target`
    already holds these very commits."""
    sources = {name: [commit.node, commit.attempt] for name, commit in parts.items()}
    facts = target / FACTS
    if facts.exists() and json.loads(facts.read_text()).get("sources") == sources:
        return
    import torch

    from workers.domains.registry import domain_of
    from workers.models.causal_lm.pretrained.export import write_folder
    from workers.specs.language import CausalLMSpec
    from workers.weights import Weights

    assert isinstance(experiment.model, CausalLMSpec)
    commits = {f"weights/{name}": commit for name, commit in parts.items()}
    weights = Weights(nodes, commits, domain_of(experiment), torch.device("cpu"))

    def states() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for part in parts:
            yield part, weights.state(part)

    companions = {
        name: nodes.read_file(model_commit.files[f"{COMPANION}{name}"])
        for name in model_commit.read(ModelResult).companions or ()
    }
    companions[FACTS] = json.dumps({"sources": sources}, indent=2).encode() + b"\n"
    # The folder appears whole, with what says whose it is: an export that was killed has left another name behind.
    for outdated in (target, *target.parent.glob(f".{target.name}.*")):
        shutil.rmtree(outdated, ignore_errors=True)
    write_folder(experiment.model, states(), companions, target)
