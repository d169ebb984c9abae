"""A trained model as a Hugging Face folder, written part by part."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from cache_store.storage.durable import sync_folder
from workers import tensor_files
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.parts import part_names, part_state_names
from workers.models.causal_lm.network.skeleton import build_skeleton, is_tied
from workers.models.causal_lm.network.structure import structure
from workers.models.causal_lm.pretrained.configs import config_json, config_untied
from workers.models.causal_lm.pretrained.locate import INDEX
from workers.models.chain import state_digest
from workers.specs.language import CausalLMSpec

#: Shards are closed at about this size, as transformers does.
SHARD_BYTES = 5 * 10**9


def write_folder(
    spec: CausalLMSpec,
    part_states: Iterable[tuple[str, Mapping[str, Tensor]]],
    companions: Mapping[str, bytes],
    target: Path,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; returns it.

    `part_states` gives every part once; no more than one shard is held at a time. Of a model that began with its LM
    head tied to its embedding, and where the two are still the same bits, one is written, and the folder says so: that
    can be seen where the embedding comes before the head. Weights appear under
    the names and in the pieces in which such checkpoints are usually stored. ConfigError when a part is missing or
    comes twice, ValueError when a part's tensors are not its own. `target` must not exist or be empty: the folder
    is written beside it and renamed when it is complete.
    """
    if target.exists() and any(target.iterdir()):
        raise refuse(f"{target} is not empty", "export", value=str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    try:
        _fill(folder, spec, part_states, companions, shard_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(folder)
    if target.exists():
        target.rmdir()
    os.replace(folder, target)
    sync_folder(target.parent)
    return target


def _fill(
    folder: Path,
    spec: CausalLMSpec,
    part_states: Iterable[tuple[str, Mapping[str, Tensor]]],
    companions: Mapping[str, bytes],
    shard_bytes: int,
) -> None:
    writer = _Shards(folder, shard_bytes)
    seen: set[str] = set()
    tie = _Tie(spec)
    for part, state in part_states:
        _check(spec, part, state, seen)
        seen.add(part)
        for name, tensor in _as_stored(spec, tie.without_copy(state)).items():
            writer.add(name, tensor)
    missing = [name for name in part_names(spec) if name not in seen]
    if missing:
        raise refuse(f"no weights were given for {', '.join(missing)}", "export", value=missing)
    writer.finish()
    for name, data in companions.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    config = companions.get("config.json") or config_json(spec, type(build_skeleton(spec)).__name__)
    (folder / "config.json").write_bytes(config if tie.holds else config_untied(config))


class _Tie:
    """Finds out whether an LM head is still its model's embedding, given the parts' states one after the other."""

    def __init__(self, spec: CausalLMSpec) -> None:
        found = structure(spec)
        self._embedding, self._lm_head = f"{found.embedding}.weight", f"{found.lm_head}.weight"
        self._tied, self._digest = is_tied(spec), ""
        #: Whether the LM head was left out.
        self.holds = False

    def without_copy(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state without the LM head's matrix, where that is the embedding's."""
        if not self._tied:
            return state
        if self._embedding in state:
            self._digest = state_digest({"": state[self._embedding]})
        if self._lm_head not in state or state_digest({"": state[self._lm_head]}) != self._digest:
            return state
        self.holds = True
        return {name: tensor for name, tensor in state.items() if name != self._lm_head}


def _check(spec: CausalLMSpec, part: str, state: Mapping[str, Tensor], seen: set[str]) -> None:
    if part in seen:
        raise refuse(f"weights were given twice for {part}", "export", value=part)
    wanted = set(part_state_names(spec, part))
    if wanted != set(state):
        differing = sorted(wanted.symmetric_difference(state))
        raise ValueError(f"{part} has not the tensors it should have: {', '.join(differing[:4])}")


def _as_stored(spec: CausalLMSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names and pieces of such checkpoints on disk (experts one by one), where transformers knows them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # internals of transformers; its loader also takes the state as it is
        return dict(state)
    return dict(revert_weight_conversion(build_skeleton(spec), dict(state)))


class _Shards:
    """Gathers tensors into files of bounded size; names them once their number is known."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > self._limit:
            self._flush()
        self._held[name] = tensor.detach()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        tensor_files.write(self._folder / f"{len(self._written)}.part", self._held, {"format": "pt"})
        self._written.append(list(self._held))
        self._held, self._bytes = {}, 0

    def finish(self) -> None:
        if self._held:
            self._flush()
        count = len(self._written)
        if count == 1:
            os.replace(self._folder / "0.part", self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._written):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._folder / f"{index}.part", self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
