"""The base class of model specs, and the families that installed packages add. Reading a task needs both."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

from cache_store.errors import ConfigError
from cache_store.suggest import did_you_mean

#: An entry point of this group, `name = "package.module:FAMILY"`, adds the family called `name`.
GROUP = "segprop.model_families"

T = TypeVar("T")


class ModelSpec:
    """A model in a configuration and in tasks: a frozen dataclass of one family derives from this.

    Its field `family` is annotated `Literal[<the family's name>]`. Fields are JSON values, tuples or such dataclasses.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    family: str

    @classmethod
    def variant(cls, value: Mapping[str, Any]) -> type[ModelSpec]:
        """The spec class that these JSON values are of. ConfigError when no such family is known."""
        return spec_class(str(value["family"]))


@dataclass(frozen=True, kw_only=True)
class FileDigests:
    """Identities of the files beside a model's weights; None for what is not there."""

    #: The tokenizer, its chat template included.
    tokenizer: str | None = None
    #: What an export copies.
    companions: str | None = None
    #: Model code that the user trusts.
    code: str | None = None


def family_name(spec: type[ModelSpec]) -> str:
    """The family a spec class says it is of. TypeError when `family` is not annotated with one literal."""
    names = typing.get_args(typing.get_type_hints(spec).get("family"))
    if len(names) != 1 or not isinstance(names[0], str):
        raise TypeError(f"{spec.__name__}.family must be annotated Literal with the family's name")
    return names[0]


def spec_class(family: str) -> type[ModelSpec]:
    """The spec class of a family. ConfigError when no such family is known."""
    for known in ModelSpec.__subclasses__():
        if family_name(known) == family:
            return known
    added: type[ModelSpec] = installed_family(family).spec
    return added


def expect(kind: type[T], value: object) -> T:
    """`value`, which must be a `kind`: for code of one family or domain, which is given what its table chose."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


@cache
def entries() -> dict[str, EntryPoint]:
    """Family name -> entry point of the package that adds it. ConfigError when two packages add one name."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            raise family_error(entry, f"{package_of(first)} adds a family of the same name; uninstall one of them")
    return found


@cache
def installed_family(name: str) -> Any:
    """The object that a package's entry point names, loaded once. `workers.models.registry` checks what it is.

    ConfigError when no package adds `name`, or when it cannot be loaded: the package and what is wrong.
    """
    known = entries()
    if name not in known:
        allowed = sorted({*known, *(family_name(spec) for spec in ModelSpec.__subclasses__())})
        raise ConfigError(
            f"model.family: {name!r} is not known{did_you_mean(name, allowed)}; allowed: {', '.join(allowed)}",
            where="model.family",
            value=name,
            allowed=allowed,
        )
    entry = known[name]
    try:
        return entry.load()
    except Exception as error:  # whatever a package raises while it is imported is its own
        raise family_error(entry, f"{entry.value} cannot be loaded: {type(error).__name__}: {error}") from error


def family_error(entry: EntryPoint, problem: str) -> ConfigError:
    """A ConfigError for a family that a package adds: its name, the package, what is wrong. Raise what this returns."""
    return ConfigError(
        f"model.family: {entry.name!r}, added by the package {package_of(entry)}: {problem}",
        where="model.family",
        value=entry.name,
    )


def package_of(entry: EntryPoint) -> str:
    """Name and version of the package that declares an entry point."""
    return "(unknown)" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
