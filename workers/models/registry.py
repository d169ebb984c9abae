"""The table of model families. Importing this module loads no torch.

A family is a folder beside this file and a row here, or a package that names one by an entry point of the group
`segprop.model_families`. `workers.models.base` says what a family is. A name of this table always means its row:
packages are only asked for names that it does not have.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from workers.models.base import ModelFamily, Traits
from workers.models.causal_lm.family import CAUSAL_LM
from workers.models.hf_text.family import HF_TEXT
from workers.models.library.family import HF_IMAGE, TIMM, TORCHVISION
from workers.models.python.family import PYTHON
from workers.models.resnet.family import RESNET
from workers.models.vgg.family import VGG
from workers.models.vit.family import VIT
from workers.specs.model import ModelSpec, entries, family_error, family_name, installed_family

#: A family as its table gives it: it takes specs of its own class, and what its own `inspect` found.
Family = ModelFamily[Any, Any]

FAMILIES: dict[str, Family] = {
    row.name: row for row in (RESNET, VGG, VIT, CAUSAL_LM, PYTHON, TORCHVISION, TIMM, HF_IMAGE, HF_TEXT)
}
#: What a configuration without `model.family` means.
DEFAULT = RESNET.name


def family_of(model: ModelSpec) -> Family:
    """The family of a model. ConfigError when it is not known."""
    return family(model.family)


def family(name: str) -> Family:
    """The family called `name`. ConfigError when it is not known, or what a package adds under it is none."""
    return FAMILIES[name] if name in FAMILIES else _checked(name)


@cache
def _checked(name: str) -> Family:
    """A family that a package adds, with everything that can be wrong with it found at once."""
    found, entry = installed_family(name), entries()[name]
    if not isinstance(found, ModelFamily):
        raise family_error(entry, f"{entry.value} is a {type(found).__name__}, not a ModelFamily")
    problems = [
        f"has no {key}" for key in ("name", "spec", "domain", "traits") if not hasattr(found, key)
    ] or _problems(found, name)
    if problems:
        raise family_error(entry, f"{entry.value} {'; '.join(problems)}")
    return found


def _problems(found: Family, name: str) -> list[str]:
    problems = []
    if found.name != name:
        problems.append(f"is called {found.name!r}")
    if not isinstance(found.traits, Traits):
        problems.append("has traits that are no Traits")
    if not (issubclass(found.spec, ModelSpec) and dataclasses.is_dataclass(found.spec)):
        problems.append(f"has the spec {found.spec.__name__}, which is no dataclass derived from ModelSpec")
        return problems
    try:
        if family_name(found.spec) != name:
            problems.append(f"has a spec of the family {family_name(found.spec)!r}")
    except TypeError as error:
        problems.append(str(error))
    return problems
