"""Builds the documentation as a site, build/site: `make docs`; `python docs/build_site.py --serve` shows it while it is
written.

The pages are those of the repository, and their links are relative to it. So the site's source is a copy,
build/site-src, of what they hold and lead to, at the same relative places; `docs/api.md` there is written from the
docstrings of `segprop`. Any warning, a link that leads nowhere included, is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "build" / "site-src"
API = """\
# Python interface

`import segprop` is the public name; the three packages behind it do the work.

::: segprop
    options:
      show_root_heading: false
      members_order: source
      show_source: false
"""
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def linked(page: Path) -> Iterator[Path]:
    """Yield what the links of a Markdown page lead to in the repository, code aside."""
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if "://" not in target and not target.startswith("mailto:"):
            yield (page.parent / target).resolve()


def files() -> list[Path]:
    """List the files of the site: the README, the folder docs and, of what is linked from them, whatever is a file."""
    waiting = [ROOT / "README.md", *_pages(ROOT / "docs")]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file() or not path.is_relative_to(ROOT):
            continue
        found.add(path)
        if path.suffix == ".md":
            waiting.extend(linked(path))
    return sorted(found)


def _pages(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".md", ".png", ".svg")]


def stage() -> None:
    """Write the site's source anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    for path in files():
        target = SOURCE / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (SOURCE / "docs" / "api.md").write_text(API)


def main() -> int:
    """Build or serve."""
    stage()
    # Not quietly: what is not logged is not counted as a warning either.
    action = ["serve"] if sys.argv[1:] == ["--serve"] else ["build", "--strict", "--clean"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([sys.executable, "-m", "mkdocs", *action], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
