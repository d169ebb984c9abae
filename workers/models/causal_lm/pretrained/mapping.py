"""Which tensors of a checkpoint make which tensors of the model.

Mostly names are equal. Some checkpoints lack the base model's prefix, some architectures store what the model holds
as one tensor in pieces (experts): transformers' own conversion table says how, and its own code converts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from cache_store.errors import first_line
from workers.models.causal_lm.errors import refuse


class Tensors(Protocol):
    """A checkpoint: names to tensors, read one at a time."""

    def names(self) -> list[str]: ...
    def file(self, name: str) -> Path: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...


@dataclass
class Recipe:
    """How some state tensors are made: one checkpoint tensor as it is, or several through a converter."""

    #: (name in the checkpoint, pattern of the converter it matched).
    sources: list[tuple[str, str | None]] = field(default_factory=list)
    converter: Any = None

    def make(self, name: str, tensors: Tensors, model: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors under names of the skeleton. They may be views of a mapped file: copy before writing."""
        if self.converter is None:
            return {name: tensors.read(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(name, source, pattern, tensors.read(source))
        try:
            made = converter.convert(name, model=model, config=model.config)
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            raise refuse(
                f"{tensors.file(self.sources[0][0])}: {name!r} cannot be made of {len(self.sources)} tensors: "
                f"{first_line(e)}",
                "model.path",
            ) from e
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


class Mapping:
    """Recipes of all state tensors of a checkpoint's layers, by name in the *unpruned* model."""

    def __init__(self, names: Iterable[str], known: set[str], model: PreTrainedModel) -> None:
        """`known`: state names of the unpruned model. Checkpoint names it does not need are left alone."""
        renamings, converters, rename = _conversions(model)
        patterns = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        wanted = dict.fromkeys(known, True)
        prefix = model.base_model_prefix
        self._recipes: dict[str, Recipe] = {}
        # In natural order, as transformers does: converters stack experts in the order they are given.
        for source in sorted(names, key=_natural):
            pattern = None
            if rename is None or (source in known and not converters):
                target = source if source in known else _with_or_without(source, prefix, known)
            else:
                target, pattern = rename(source, renamings, converters, prefix, wanted)
                if target not in known and source in known:
                    target, pattern = source, None
            if target not in known:
                continue
            recipe = self._recipes.setdefault(target, Recipe())
            recipe.sources.append((source, pattern))
            if pattern is not None:
                recipe.converter = patterns[pattern]
                for other in recipe.converter.target_patterns[1:]:
                    # One source, several targets: all of them are made by the recipe of the first.
                    self._recipes.setdefault(target.replace(recipe.converter.target_patterns[0], other), recipe)
        self._firsts = self._first_names()

    def _first_names(self) -> dict[int, str]:
        firsts: dict[int, str] = {}
        for name, recipe in self._recipes.items():
            firsts.setdefault(id(recipe), name)
        return firsts

    def recipe(self, name: str) -> Recipe | None:
        return self._recipes.get(name)

    def first(self, recipe: Recipe) -> str:
        """The name under which the recipe is made."""
        return self._firsts[id(recipe)]


def _natural(name: str) -> list[tuple[int, str | int]]:
    return [(0, int(step)) if step.isdecimal() else (1, step) for step in name.split(".")]


def _with_or_without(name: str, prefix: str, known: set[str]) -> str:
    """The name with the base model's prefix put before it, or taken away, where the model knows that one."""
    longer, shorter = f"{prefix}.{name}", name.removeprefix(f"{prefix}.")
    return longer if longer in known else shorter if shorter in known else name


def _conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any], Any]:
    """Renamings and converters of transformers' table for this model, and the function that applies them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # internals of transformers: without them names must simply be equal
        return [], [], None
    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    return renamings, converters, rename_source_key
