"""Import the modules of a user's functions, anew where their source is other than before, and call the functions."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cache_store.suggest import did_you_mean
from workers.user_code.source import UserCode, code_error, module_name

_lock = threading.RLock()
#: Module that a function was loaded from -> the code it was loaded with.
_loaded: dict[str, UserCode] = {}


def load(code: UserCode, where: str) -> Callable[..., Any]:
    """Import the module and return the function. Modules that were imported from other source are imported anew.

    ConfigError at the key `where` for a module that fails, or that has no such function.
    """
    with _lock:
        if not code.installed and _loaded.get(code.module) != code:
            _forget(code)
        module = _imported(code, where)
        _loaded[code.module] = code
    found = getattr(module, code.function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise code_error(
            where,
            f"{code.module} has no function {code.function!r}{did_you_mean(code.function, names)}",
            f"{code.module}:{code.function}",
        )
    function: Callable[..., Any] = found
    return function


def call(code: UserCode, args: Mapping[str, Any] | None, where: str) -> Any:
    """Load the function and call it with `args` by name. ConfigError at the key `where` when it raises anything."""
    function = load(code, where)
    try:
        return function(**(args or {}))
    except Exception as error:  # whatever it raises is the user's own
        raise code_error(where, f"{code.module}:{code.function} failed: {words_of(error)}") from error


def words_of(error: BaseException) -> str:
    """Say what an error of a user's code is, and the last line of the traceback that is in a file."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = "" if last is None else f" ({Path(last.tb_frame.f_code.co_filename).name}, line {last.tb_lineno})"
    return f"{type(error).__name__}: {error}{place}"


def _imported(code: UserCode, where: str) -> Any:
    root = str(code.root.resolve())
    if code.installed:
        return _import(code, where)
    # In front while it is imported, behind everything else for what it imports later.
    sys.path.insert(0, root)
    try:
        importlib.invalidate_caches()
        return _import(code, where)
    finally:
        sys.path.remove(root)
        if root not in sys.path:
            sys.path.append(root)


def _import(code: UserCode, where: str) -> Any:
    try:
        return importlib.import_module(code.module)
    except Exception as error:  # whatever it raises is the user's own
        raise code_error(where, f"{code.module} cannot be imported: {words_of(error)}") from error


def _forget(code: UserCode) -> None:
    """Drop the modules of the code, and of what the same name was loaded from before, so that they are read again."""
    names = {name for name in map(module_name, code.files) if name}
    before = _loaded.get(code.module)
    names |= {name for name in map(module_name, before.files if before else ()) if name}
    for name in names:
        sys.modules.pop(name, None)
    top = code.module.partition(".")[0]
    held = sys.modules.get(top)
    if held is not None and not _lies_below(held, code.root):
        for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
            del sys.modules[name]


def _lies_below(module: Any, root: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(root.resolve())
