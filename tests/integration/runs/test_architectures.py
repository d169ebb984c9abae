"""docs/architectures.md says of one architecture of each kind what is found of it today, and holds no others."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from architectures import CASES, SAMPLED, examine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_architectures", ROOT / "docs" / "generate_architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_the_page_is_of_the_architectures_that_are_tried(generator: ModuleType) -> None:
    text = generator.TARGET.read_text()
    found = generator.listed(text)
    assert [f"{row.library}/{row.name}" for row in found] == list(CASES)
    assert text.partition("| --- |")[2] == generator.page(found).partition("| --- |")[2]
    kinds = Counter(row.library for row in found if not row.reason)
    assert kinds.total() >= 40
    assert len(kinds) == 5


@pytest.mark.parametrize("name", SAMPLED)
def test_what_the_page_says_is_found_today(generator: ModuleType, name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed (segprop[timm])")
    (said,) = (row for row in generator.listed(generator.TARGET.read_text()) if f"{row.library}/{row.name}" == name)
    assert examine(name, CASES[name]) == said
