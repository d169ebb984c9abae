"""Every causal LM of the installed transformers: equal to its own forward, or refused with a reason."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.long
def test_no_family_differs_or_fails_untyped_and_the_page_says_what_came_of_each() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "generate_model_families.py"))
    found = module["examined"]()
    assert all(family.supported or family.reason for family in found)
    assert (ROOT / "docs" / "model-families.md").read_text() == module["page"](found), (
        "run python docs/generate_model_families.py"
    )
