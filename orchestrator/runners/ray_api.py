"""Typed faces of Ray's decorators, whose own annotations do not say what they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import ray
from ray.actor import ActorHandle

F = TypeVar("F", bound=Callable[..., Any])
_ray: Any = ray


class ActorClass(Protocol):
    """A class whose instances are actors."""

    def options(self, **options: Any) -> ActorClass: ...

    def remote(self, *arguments: Any) -> ActorHandle: ...


class RemoteFunction(Protocol):
    """A function that runs as a task. `remote` returns the reference of its result."""

    def options(self, **options: Any) -> RemoteFunction: ...

    def remote(self, *arguments: Any) -> Any: ...


def actor_class(cls: type, **options: Any) -> ActorClass:
    """Make an actor class, with `ray.remote`'s options."""
    made: ActorClass = _ray.remote(**options)(cls)
    return made


def remote_function(function: Callable[..., Any], **options: Any) -> RemoteFunction:
    """Make a remote function, with `ray.remote`'s options."""
    made: RemoteFunction = _ray.remote(**options)(function)
    return made


def in_group(name: str) -> Callable[[F], F]:
    """Run a method in this concurrency group of its actor."""
    decorator: Callable[[F], F] = _ray.method(concurrency_group=name)
    return decorator
