"""Segment-wise training of networks, from Python.

    import segprop

    run = segprop.run("own_network.yaml", **{"training.epochs": 3})
    run.accuracy            # of the test split, by regime
    run.frame()             # every epoch of every stage, for pandas
    model = segprop.load(run.dir, "segprop")

Importing this package loads neither torch nor anything else that takes time: names are looked up when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segprop.runs import Run, load, plan, run
    from workers.models.python.chain_module import Chain

__all__ = ["Chain", "Run", "load", "plan", "run"]

#: Name -> the module that defines it. `Chain` is of `workers`, so that a network's code loads no orchestrator.
_HOMES = {
    "Chain": "workers.models.python.chain_module",
    "Run": "segprop.runs",
    "load": "segprop.runs",
    "plan": "segprop.runs",
    "run": "segprop.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'segprop' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
