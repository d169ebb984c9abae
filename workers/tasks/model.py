"""Execute a model task: initial weights, or the import of a checkpoint."""

from __future__ import annotations

import time
from typing import Any

from safetensors.torch import save as save_bytes

from cache_store.errors import Interrupted
from cache_store.records.nodes import Attempt
from workers.environment import WorkerEnvironment
from workers.export import COMPANION
from workers.models import registry
from workers.models.chain import state_digest
from workers.specs import tasks
from workers.specs.language import CausalLMSpec


def _initial_model(task: tasks.ModelTask, environment: WorkerEnvironment, attempt: Attempt) -> dict[str, Any]:
    started = time.monotonic()
    if isinstance(task.model, CausalLMSpec):
        return _import_language_model(task, task.model, environment, attempt)
    state = registry.initial_state(task.model, task.classes, task.seed)
    attempt.write("state.safetensors", save_bytes(state))
    return attempt.commit(
        {
            "digest": state_digest(state),
            "seconds": time.monotonic() - started,
            "where": environment.where(),
        }
    )


def _import_language_model(
    task: tasks.ModelTask, model: CausalLMSpec, environment: WorkerEnvironment, attempt: Attempt
) -> dict[str, Any]:
    """One file a part, written as it is read: the model is never held whole."""
    from workers.models.causal_lm.network.parts import part_names
    from workers.models.causal_lm.pretrained.import_parts import companions, import_parts
    from workers.models.causal_lm.pretrained.verify import verify_chain

    started = time.monotonic()
    # Before hours are spent on it: a small model of this architecture gives the same logits as a chain and by itself.
    verify_chain(model)
    total = len(part_names(model))
    parts: dict[str, Any] = {}
    for name, state in import_parts(model, task.seed):
        file = f"{name}.safetensors"
        record = attempt.write(file, save_bytes(state))
        parts[name] = {"file": file, "digest": state_digest(state), "bytes": record["bytes"]}
        environment.control.progress(phase="import", done=len(parts), total=total, unit="parts")
        if environment.control.should_stop():
            raise Interrupted("the import of the model was stopped; it starts again with the next run")
    beside = companions(model)
    for name, data in beside.items():
        attempt.write(f"{COMPANION}{name}", data)
    return attempt.commit(
        {
            "parts": parts,
            "companions": sorted(beside),
            "seconds": time.monotonic() - started,
            "where": environment.where(),
        }
    )
