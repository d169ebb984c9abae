"""torchao for single tests: where it can be imported, transformers and peft load it, too."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

#: Where `make setup` puts it.
TORCHAO = Path(sys.prefix) / "torchao"
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None and not TORCHAO.is_dir(),
    reason="needs torchao, which `make setup` installs",
)
#: Modules of torchao, which registers operators with torch and so can be loaded only once.
_loaded: dict[str, Any] = {}


@contextmanager
def torchao_there() -> Iterator[None]:
    """Have torchao inside, and not afterwards."""
    sys.path.append(str(TORCHAO))
    sys.modules.update(_loaded)
    try:
        yield
    finally:
        sys.path.remove(str(TORCHAO))
        _loaded.update({name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchao"})
        for name in _loaded:
            sys.modules.pop(name, None)
