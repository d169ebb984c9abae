"""Imports point one way, between packages and between their folders, and heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: The only modules that may import Ray.
RAY = {
    "orchestrator/runners/ray.py",
    "orchestrator/runners/ray_api.py",
    "orchestrator/runners/ray_cluster.py",
    "orchestrator/runners/ray_worker.py",
    "orchestrator/runners/gang.py",
    "orchestrator/runners/gang_rank.py",
    "orchestrator/sweeps/ray_tune.py",
}
FSSPEC = {"cache_store/storage/memory.py"}
LIGHT = [
    "orchestrator.plan.builder",
    "workers.specs.experiment",
    "workers.models.registry",
    "workers.models.outline",
    "orchestrator.config.load",
    "orchestrator.config.rules.gangs",
    "orchestrator.runners.gang_size",
]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute names of all that `source`, a module of `package`, imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*base, *([node.module] if node.module else [])))


def offenders(package: str, forbidden: set[str], allowed: Set[str] = frozenset()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(package)
        if path.relative_to(ROOT).as_posix() not in allowed
        for name in imported(path.read_text(), path.relative_to(ROOT).parts[:-1])
        if name.split(".")[0] in forbidden
    ]


def test_the_packages_are_found() -> None:
    assert all(modules(package) for package in ("orchestrator", "workers", "cache_store"))


def test_cache_store_knows_neither_workers_nor_orchestrator_nor_ray() -> None:
    assert offenders("cache_store", {"workers", "orchestrator", "ray"}) == []


def test_workers_know_neither_orchestrator_nor_ray() -> None:
    assert offenders("workers", {"orchestrator", "ray"}) == []


def test_nothing_below_it_imports_what_people_import() -> None:
    for package in ("orchestrator", "workers", "cache_store"):
        assert offenders(package, {"segprop"}) == []


def test_ray_is_imported_in_its_runner_alone() -> None:
    assert offenders("orchestrator", {"ray"}, RAY) == []


def test_the_cache_store_touches_fsspec_in_storage_alone() -> None:
    assert offenders("cache_store", {"fsspec"}, FSSPEC) == []


def test_nothing_that_ships_imports_the_tests() -> None:
    for package in ("segprop", "orchestrator", "workers", "cache_store"):
        assert offenders(package, {"tests", "pytest", "hypothesis", "benchmarks"}) == []


def test_the_walk_sees_imports_inside_functions_and_relative_ones() -> None:
    """The judge itself: were it blind, everything above would pass."""
    source = "def f():\n    import ray.train\n    from ..models import x\n    from orchestrator import plan\n"
    assert set(imported(source, ("workers", "data"))) == {"ray.train", "workers.models", "orchestrator"}


@pytest.mark.parametrize("module", LIGHT)
def test_planning_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print([n for n in ('torch', 'torchvision', 'ray') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
