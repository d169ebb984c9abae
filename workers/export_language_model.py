"""The outcome of a regime as a Hugging Face folder: `AutoModelForCausalLM.from_pretrained` loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache_store.records.nodes import NodeStore
from workers.specs import Experiment

FACTS = "segprop.json"
#: Files beside a language model's weights (tokenizer, generation settings) are committed under names that begin so.
COMPANION = "companion-"


def export_language_model(
    experiment: Experiment,
    parts: Mapping[str, Mapping[str, Any]],
    model_commit: Mapping[str, Any],
    nodes: NodeStore,
    target: Path,
) -> None:
    """Write the folder, one part in memory at a time. `parts` maps every part to the commit that holds it;
    `model_commit`: the import's, with tokenizer and settings. Nothing is done, and torch is not imported, when `target`
    already holds these very commits."""
    sources = {name: [commit["node"], commit["attempt"]] for name, commit in parts.items()}
    facts = target / FACTS
    if facts.exists() and json.loads(facts.read_text()).get("sources") == sources:
        return
    import torch

    from workers.domains import domain_of
    from workers.lm_specs import CausalLMSpec
    from workers.models.causal_lm.export import write_folder
    from workers.weights import Weights

    assert isinstance(experiment.model, CausalLMSpec)
    commits = {f"weights/{name}": commit for name, commit in parts.items()}
    weights = Weights(nodes, commits, domain_of(experiment), torch.device("cpu"))

    def states() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for part in parts:
            yield part, weights.state(part)

    companions = {
        name: nodes.read_file(model_commit["files"][f"{COMPANION}{name}"])
        for name in model_commit["result"]["companions"]
    }
    companions[FACTS] = json.dumps({"sources": sources}, indent=2).encode() + b"\n"
    # The folder appears whole, with what says whose it is: an export that was killed has left another name behind.
    for outdated in (target, *target.parent.glob(f".{target.name}.*")):
        shutil.rmtree(outdated, ignore_errors=True)
    write_folder(experiment.model, states(), companions, target)
