"""Folders of a package import downwards only, no modules import each other in a circle, and no folder is a heap.

Imports inside functions and those for type checkers count as any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Folders and files at the top of each package: a line may import what stands below it, and nothing beside it.
ORDER = {
    "orchestrator": (
        "run",
        "cli",
        "commands",
        "ui",
        "sweeps status profiling",
        "runs cache",
        "exports",
        "generating",
        "execution judging",
        "trackers runners",
        "reports",
        "plan",
        "costs",
        "config",
        "regimes progress",
        "units environment env_file",
    ),
    "workers": (
        "tasks",
        "tracing",
        "training measures",
        "export snapshots",
        "weights environment",
        "domains",
        "models",
        "data distributed transfers",
        "device tensor_files",
        "judge",
        "control file_digests overlap specs seeds update_slices user_code versions",
        "user_cache",
    ),
    "cache_store": (
        "audit",
        "snapshots",
        "records",
        "formats",
        "storage",
        "errors keys crashpoints suggest",
    ),
}
#: Inside the language models, whose package says what each is: a line may import what stands in it or below it.
LANGUAGE_MODELS = (
    "family survey",
    "inspect remembered training",
    "trials",
    "pretrained",
    "memory",
    "gathered",
    "kept",
    "network",
    "counting",
    "outline errors",
    "tie",
)
#: Python files in a folder, `__init__` counted.
MOST_FILES = 15
Graph = Mapping[str, frozenset[str]]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def graph() -> Graph:
    """Module -> modules of ours that it imports, wherever in its text."""
    paths = {module_name(path): path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))}
    return {name: frozenset(imports(path.read_text(), paths.keys())) - {name} for name, path in paths.items()}


def imports(source: str, known: Set[str]) -> Iterator[str]:
    names = set(known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & names
            yield from inner
            if node.module in names and len(inner) < len(node.names):
                yield node.module


def upward(edges: Graph) -> list[str]:
    """Imports of a folder that does not stand below the importing one."""
    place = {
        f"{package}.{name}": index
        for package, lines in ORDER.items()
        for index, line in enumerate(lines)
        for name in line.split()
    }
    wrong = []
    for module, targets in sorted(edges.items()):
        here = ".".join(module.split(".")[:2])
        for target in sorted(targets):
            there = ".".join(target.split(".")[:2])
            if here == there or here.split(".")[0] != there.split(".")[0] or "." not in here or "." not in there:
                continue
            if here not in place or there not in place:
                wrong.append(f"{module} imports {target}: a folder without a place in ORDER")
            elif place[there] <= place[here]:
                wrong.append(f"{module} imports {target}")
    return wrong


def circles(edges: Graph) -> list[list[str]]:
    """Sets of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return found


@pytest.mark.parametrize("package", list(ORDER))
def test_folders_import_downwards_only(package: str) -> None:
    assert upward({module: targets for module, targets in graph().items() if module.startswith(package)}) == []


def test_language_models_import_downwards_only() -> None:
    package = "workers.models.causal_lm."
    place = {name: index for index, line in enumerate(LANGUAGE_MODELS) for name in line.split()}
    found = [
        (module, target)
        for module, targets in graph().items()
        for target in targets
        if module.startswith(package) and target.startswith(package)
    ]
    assert len(found) > 50
    assert [
        f"{module} imports {target}"
        for module, target in found
        if place[target.split(".")[3]] < place[module.split(".")[3]]
    ] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == []


def test_no_folder_has_more_files_than_one_can_look_through() -> None:
    heaps = {
        str(folder.relative_to(ROOT)): count
        for package in (*ORDER, "benchmarks")
        for folder in [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES
    }
    assert heaps == {}


def test_the_judges_see_what_they_are_for() -> None:
    edges = {"workers.data.x": frozenset({"workers.training.y"}), "workers.training.y": frozenset({"workers.data.x"})}
    assert upward(edges) == ["workers.data.x imports workers.training.y"]
    assert circles(edges) == [["workers.data.x", "workers.training.y"]]
    inside = "def f():\n    from workers.training import y\n"
    assert list(imports(inside, {"workers.training", "workers.training.y"})) == ["workers.training.y"]
    assert len(graph()) > 250
