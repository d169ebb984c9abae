"""What is asked in one place only: which family or domain something is of, which known name a wrong one is close to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Asking for one of these by `isinstance` is asking which family, domain or data set it is.
SPECS = {
    "ResNetSpec",
    "CausalLMSpec",
    "ImageSpec",
    "TextSpec",
    "DataOutline",
    "TextOutline",
    "LMOutline",
    "ModelFamily",
    "ResNetFamily",
    "CausalLMFamily",
}
#: The table itself looks at what a package gave it.
TABLES = {"workers/models/registry.py": {"ModelFamily"}}


def sources() -> list[tuple[str, ast.Module]]:
    found = [
        (path.relative_to(ROOT).as_posix(), ast.parse(path.read_text()))
        for package in ("orchestrator", "workers", "cache_store")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    assert len(found) > 200
    return found


def asked_classes(tree: ast.AST) -> Iterator[str]:
    """Names in the second argument of every `isinstance` and `issubclass`, and in class patterns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("is"):
            yield from (name.id for item in node.args[1:] for name in ast.walk(item) if isinstance(name, ast.Name))
        if isinstance(node, ast.MatchClass):
            yield from (name.id for name in ast.walk(node.cls) if isinstance(name, ast.Name))


def compared_kinds(tree: ast.AST) -> Iterator[str]:
    """Comparisons in which something called `family`, or the `kind` of something, meets a text."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        members = [part for side in sides for part in parts(side)]
        texts = any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in members)
        if texts and any(ast.unparse(side).endswith(("family", "'family')", ".kind", "['kind']")) for side in sides):
            yield ast.unparse(node)


def parts(side: ast.expr) -> list[ast.expr]:
    """The members of a tuple, list or set that something is looked up in; else the expression itself."""
    return list(side.elts) if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]


def test_nobody_outside_its_table_asks_which_family_domain_or_kind_something_is_of() -> None:
    offenders = [
        f"{path}: isinstance of {name}"
        for path, tree in sources()
        for name in asked_classes(tree)
        if name in SPECS - TABLES.get(path, set())
    ]
    offenders += [f"{path}: {text}" for path, tree in sources() for text in compared_kinds(tree)]
    assert offenders == []


@pytest.mark.parametrize(
    "source",
    ["isinstance(data, (int, ImageSpec))", "match x:\n case TextSpec(): pass", "issubclass(kind, ResNetSpec)"],
)
def test_the_walk_sees_every_way_to_ask(source: str) -> None:
    assert set(asked_classes(ast.parse(source))) & SPECS


def test_the_walk_sees_comparisons_of_families_and_kinds() -> None:
    for source in (
        "node.kind in ('train', 'model')",
        "regime.kind != 'segprop'",
        "item['kind'] == 'set'",
        "model.family == 'resnet'",
        "task['model'].get('family') == 'causal_lm'",
        "'mlp' != family",
    ):
        assert list(compared_kinds(ast.parse(source)))


def test_names_that_are_close_are_looked_for_in_one_place() -> None:
    users = [
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and any(alias.name == "difflib" for alias in node.names)
    ]
    assert users == ["cache_store/suggest.py"]


def test_rules_of_a_configuration_know_no_document() -> None:
    knowing = [
        path
        for path, tree in sources()
        if path.startswith("orchestrator/config/rules/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.alias) and "Document" in (getattr(node, "id", ""), getattr(node, "name", ""))
    ]
    assert set(knowing) == {"orchestrator/config/rules/check.py"}, "which looks up the lines, once, at the end"
