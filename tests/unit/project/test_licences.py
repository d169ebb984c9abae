"""docs/licences.md and the bill of materials say what the locks pin."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_licences", ROOT / "docs" / "generate_licences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_every_pinned_package(generator: ModuleType) -> None:
    rows = re.findall(r"^\| ([^ ]+) \| ([^ ]+) \| (.+) \|$", generator.TARGET.read_text(), flags=re.MULTILINE)[2:]
    locks = "".join(path.read_text() for path in generator.locks())
    pins = {name.lower(): pinned for name, pinned in re.findall(r"^([\w.-]+)==([^ ;\\]+)", locks, flags=re.MULTILINE)}
    assert {name.lower(): pinned for name, pinned, _ in rows} == pins, "run `make licences`"
    assert {name: licence for name, _, licence in rows}["numpy"].startswith("BSD-3-Clause")


def test_the_bill_of_materials_names_what_is_installed_and_the_hashes_that_are_allowed(generator: ModuleType) -> None:
    bill = generator.bill(generator.packages())
    parts = {part["name"]: part for part in bill["components"]}
    arrow = parts["pyarrow"]
    assert (arrow["version"], arrow["purl"]) == (version("pyarrow"), f"pkg:pypi/pyarrow@{version('pyarrow')}")
    lock = (ROOT / "requirements.lock").read_text()
    assert {item["value"] for item in arrow["properties"]} == set(
        re.findall("sha256:([0-9a-f]{64})", lock.split("\npyarrow==")[1].split("\n\n")[0].split("\npy")[0])
    )
    assert len({part["bom-ref"] for part in bill["components"]}) == len(bill["components"])
