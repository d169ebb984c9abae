"""Load the page templates: one Jinja environment for all reports, and for the live page, which shares their parts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_OWN = Path(__file__).parent / "templates"


def template(name: str, folder: Path = _OWN) -> Template:
    """Return the page template called `name`, of `folder` or of the reports. HTML is escaped, and a value that is
    missing is an error."""
    return _environment(folder).get_template(name)


@cache
def _environment(folder: Path) -> Environment:
    return Environment(
        loader=FileSystemLoader([folder, _OWN]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
