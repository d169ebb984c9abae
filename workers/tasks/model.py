"""Execute a model task: initial weights, or the import of a checkpoint."""

from __future__ import annotations

import time

from safetensors.torch import save as save_bytes

from cache_store.errors import Interrupted
from cache_store.records.nodes import Attempt, Commit
from workers.control import Update
from workers.environment import WorkerEnvironment
from workers.export import COMPANION
from workers.models import registry
from workers.models.chain import state_digest
from workers.specs import tasks
from workers.specs.language import CausalLMSpec
from workers.specs.results import ModelResult, PartRecord
from workers.weights import write_part


def _initial_model(task: tasks.ModelTask, environment: WorkerEnvironment, attempt: Attempt) -> Commit:
    started = time.monotonic()
    if isinstance(task.model, CausalLMSpec):
        return _import_language_model(task, task.model, environment, attempt)
    state = registry.initial_state(task.model, task.classes, task.seed)
    attempt.write("state.safetensors", save_bytes(state))
    result = ModelResult(digest=state_digest(state), seconds=time.monotonic() - started, where=environment.where())
    return attempt.commit(result.to_json())


def _import_language_model(
    task: tasks.ModelTask, model: CausalLMSpec, environment: WorkerEnvironment, attempt: Attempt
) -> Commit:
    """One file a part, written as it is read: the model is never held whole."""
    from workers.models.causal_lm.network.parts import part_names
    from workers.models.causal_lm.pretrained.import_parts import companions, import_parts
    from workers.models.causal_lm.trials.verify import verify_chain

    started = time.monotonic()
    # Before hours are spent on it: a small model of this architecture gives the same logits as a chain and by itself.
    verify_chain(model)
    total = len(part_names(model))
    parts: dict[str, PartRecord] = {}
    for name, state in import_parts(model, task.seed):
        parts[name] = write_part(attempt, name, state)
        environment.control.progress(Update(phase="import", done=len(parts), total=total, unit="parts"))
        if environment.control.should_stop():
            raise Interrupted("the import of the model was stopped; it starts again with the next run")
    beside = companions(model)
    for name, data in beside.items():
        attempt.write(f"{COMPANION}{name}", data)
    result = ModelResult(
        parts=parts,
        companions=tuple(sorted(beside)),
        seconds=time.monotonic() - started,
        where=environment.where(),
    )
    return attempt.commit(result.to_json())
