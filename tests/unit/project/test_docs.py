"""The documentation says what the code does, and nothing about the machine it was written on."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "configs").glob("*.yaml"),
        ROOT / "Makefile",
    ]
)


def test_the_configuration_page_is_current() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "generate_configuration.py"))
    assert (ROOT / "docs" / "configuration.md").read_text() == module["generate"](), (
        "run python docs/generate_configuration.py"
    )


def test_every_key_of_the_configuration_is_explained() -> None:
    rows = [line for line in (ROOT / "docs" / "configuration.md").read_text().splitlines() if "| `" in line]
    silent = [row for row in rows if not row.rstrip().rstrip("|").rsplit("|", 1)[-1].strip()]
    assert silent == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_machine_path_and_no_package_index_is_named(page: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:home|root|work|Users)/\S*|https?://\S*(?:pypi|/simple)\S*", page.read_text())
    assert found == []


def test_the_lock_names_no_index_no_link_and_no_path() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    for line in lines:
        assert re.fullmatch(
            r"#.*|    --hash=sha256:[0-9a-f]{64}( \\)?|[a-z0-9][a-z0-9._-]*==[^\s@]+( ; [^@]+?)?( \\)?", line
        ), line
    assert any(line.startswith("torch==") for line in lines)
    assert any(line.startswith("setuptools==") for line in lines), "make setup builds without isolation"


def test_every_test_that_security_points_to_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| who | ", "| ---"))]
    assert len(rows) > 20
    assert [row for row in rows if "::" not in row] == []
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert missing == []
