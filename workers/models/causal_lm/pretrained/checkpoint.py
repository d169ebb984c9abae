"""A stored checkpoint as the state of parts: names, shapes and tensors under the names of the (pruned) model."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from workers.file_digests import file_digest
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.parts import assemble, part_names
from workers.models.causal_lm.network.skeleton import build_skeleton
from workers.models.causal_lm.network.structure import structure
from workers.models.causal_lm.pretrained.configs import kept_layers, tied, whole_config
from workers.models.causal_lm.pretrained.gguf_file import GGUFTensors
from workers.models.causal_lm.pretrained.locate import Located
from workers.models.causal_lm.pretrained.mapping import Mapping, Recipe, Tensors
from workers.models.causal_lm.pretrained.safetensors_files import SafetensorsFiles, index_file, weight_files
from workers.specs.language import CausalLMSpec

_SHOWN = 4


class Checkpoint:
    """The weights a task's spec points at, checked against the model before anything is read."""

    def __init__(self, spec: CausalLMSpec, located: Located) -> None:
        """Compare all names and shapes. ConfigError names the file of whatever is missing or does not fit."""
        self._spec = spec
        self._model = build_skeleton(spec)
        self._found = structure(spec)
        self._kept = kept_layers(spec, self._found.count)
        self._head = f"{self._found.lm_head}.weight"
        self._embedding = f"{self._found.embedding}.weight"
        self._place = located.gguf or located.folder
        self._tensors: Tensors = (
            SafetensorsFiles(located.folder)
            if located.gguf is None
            else GGUFTensors(located.gguf, self._unpruned(located))
        )
        self._mapping = Mapping(self._tensors.names(), self._known(), self._model)
        #: Of tied weights a checkpoint may hold one: the name of the missing one, and where it is found.
        self._twins: dict[str, str] = {}
        if tied(spec, located):
            for missing, other in ((self._head, self._embedding), (self._embedding, self._head)):
                if self._mapping.recipe(missing) is None and self._mapping.recipe(other) is not None:
                    # Each part has a copy of what there is.
                    self._twins[missing] = other
        self._check()

    def holds_one_matrix(self) -> bool:
        """Tell whether embedding and LM head are one: of two that are stored, whether they are equal, as transformers
        decides. Reads both then."""
        if self._twins:
            return True
        pair = [self._recipe(name).sources[0][0] for name in (self._embedding, self._head)]
        return torch.equal(*(self._tensors.read(name) for name in pair))

    def _unpruned(self, located: Located) -> PreTrainedModel:
        """The skeleton of all layers the file has: GGUF's names are looked up by number."""
        if not self._spec.prune:
            return self._model
        every = replace(self._spec, prune=(), config=None)
        return build_skeleton(replace(every, config=whole_config(every, located)))

    def _known(self) -> set[str]:
        """State names of the unpruned model: those of any layer, for every number in the checkpoint."""
        names = set(self._model.state_dict())
        layers = f"{self._found.layers}."
        inside = {name.removeprefix(layers).partition(".")[2] for name in names if name.startswith(layers)}
        return {name for name in names if not name.startswith(layers)} | {
            f"{layers}{index}.{name}" for index in range(self._kept[-1] + 1) for name in inside
        }

    def _stored(self, name: str) -> str:
        """The name a state tensor has in the unpruned model."""
        layers = f"{self._found.layers}."
        if name in self._twins:
            return self._twins[name]
        if not name.startswith(layers):
            return name
        index, _, rest = name.removeprefix(layers).partition(".")
        return f"{layers}{self._kept[int(index)]}.{rest}"

    def _check(self) -> None:
        missing, wrong = [], []
        for part in part_names(self._spec):
            for name, tensor in assemble(self._spec, part).state_dict().items():
                recipe = self._mapping.recipe(self._stored(name))
                if recipe is None:
                    missing.append(name)
                else:
                    wrong += self._other_shape(name, tuple(tensor.shape), recipe)
        if missing:
            raise refuse(
                f"{self._place} lacks {len(missing)} tensors of the model, first {', '.join(missing[:_SHOWN])}",
                "model.path",
                value=str(self._place),
            )
        if wrong:
            more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise refuse(f"shapes do not fit: {'; '.join(wrong[:_SHOWN])}{more}", "model.path", value=str(self._place))

    def _other_shape(self, name: str, shape: tuple[int, ...], recipe: Recipe) -> list[str]:
        """Say so where the checkpoint has another shape than `shape` for a tensor that is taken as it is."""
        if recipe.converter is not None:
            return []
        source = recipe.sources[0][0]
        stored = self._tensors.shape(source)
        if stored == shape:
            return []
        text = f"{source!r} in {self._tensors.file(source)} is {stored}, not {shape}"
        if name in (self._embedding, self._head):
            text += f" (the vocabulary is {shape[0]} in the configuration)"
        return [text]

    def state(self, part: str) -> dict[str, Tensor]:
        """The state of one part on the host in the types the model holds it in (the master type, but for what stays
        float32), contiguous, sharing no memory with anything."""
        held = assemble(self._spec, part).state_dict()
        names = {self._stored(name): name for name in held}
        state: dict[str, Tensor] = {}
        done: set[int] = set()
        for stored in names:
            recipe = self._recipe(stored)
            if id(recipe) in done:
                continue
            done.add(id(recipe))
            for key, tensor in recipe.make(self._mapping.first(recipe), self._tensors, self._model).items():
                if key in names:
                    name = names[key]
                    state[name] = tensor.to(held[name].dtype, copy=True).contiguous()
        return {name: state[name] for name in names.values()}

    def _recipe(self, stored: str) -> Recipe:
        recipe = self._mapping.recipe(stored)
        if recipe is None:
            raise LookupError(f"{stored}: not in the checkpoint, which was checked at construction")
        return recipe


def weights_digest(located: Located) -> str:
    """Identity of a checkpoint's weight files (32 hex characters), without downloading any.

    From the hub: the commit. Local: the files' bytes, all of them, whenever they were written.
    """
    total = hashlib.sha256()
    if located.commit is not None:
        total.update(f"hub|{located.commit}|{located.gguf.name if located.gguf else ''}".encode())
        return total.hexdigest()[:32]
    files = [located.gguf] if located.gguf is not None else weight_files(located.folder)
    index = index_file(located.folder) if located.gguf is None else None
    for path in [*files, *([index] if index is not None else [])]:
        try:
            total.update(f"|{path.name}|{file_digest(path)}".encode())
        except OSError as e:
            raise refuse(f"{path} cannot be read: {e.strerror}", "model.path") from e
    return total.hexdigest()[:32]
