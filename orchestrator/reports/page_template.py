"""Load the page templates: one Jinja environment for all reports, and for the live page, which shares their parts."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

_OWN = Path(__file__).parent / "templates"


def template(name: str, folder: Path = _OWN) -> Template:
    """Return the page template called `name`, of `folder` or of the reports. HTML is escaped, and a value that is
    missing is an error."""
    return _environment(folder).get_template(name)


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, _OWN]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"script": Markup(_script()), "policy": _policy()}
    return environment


@cache
def _script() -> str:
    """Return the script of reports: all that runs in them."""
    return (_OWN / "report.js.j2").read_text()


def _policy() -> str:
    """Return what a report may do: run that script, which it has inline as its styles, and load nothing."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )
