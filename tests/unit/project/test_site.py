"""What the documentation's site is made of; that it builds without a warning is `make docs`."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]


def test_the_site_holds_every_page_and_what_pages_lead_to() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in runpy.run_path(str(ROOT / "docs/build_site.py"))["files"]()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} <= names
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
        "deploy/README.md",
        "docs/img/report.png",
    } <= names
    assert "examples/own_network/mynets.py" in names, "linked from a page"
    assert not [name for name in names if name.startswith(("tests/", ".venv", "build/"))]


def test_every_page_but_the_notes_on_design_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (docs/\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"docs/api.md", "docs/design/001-architecture.md"} == listed
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]["font"] is False, (
        "nothing is loaded from elsewhere"
    )
