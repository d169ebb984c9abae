"""Find functions that a user wrote, named `module:function`, and identify the code that they come from.

A module is looked for in one folder (`path`), then in the current directory, then among installed packages. What
identifies it is its source and that of everything it imports below the same folder, found without running any of it; of
an installed package the source of the whole package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_store.errors import ConfigError
from cache_store.suggest import did_you_mean

#: How Ray names the folders it unpacks the working directory of a submitted job into.
PACKAGE = "_ray_pkg_"
_PLAIN = str.isidentifier


@dataclass(frozen=True)
class UserCode:
    """A function and its source. `root`: the folder below which its module lies; `files`: the source files, relative to
    it, sorted; `digest`: sha256 of their names and contents."""

    module: str
    function: str
    root: Path
    files: tuple[str, ...]
    digest: str
    installed: bool = False

    def travelling(self) -> str | None:
        """`root` as tasks name it: absolute, so that processes of other folders find it; below a submitted job's copy
        of its working directory relative, since each machine has a copy of its own. None for an installed package."""
        if self.installed:
            return None
        here = Path.cwd()
        root = self.root.resolve()
        if any(part.startswith(PACKAGE) for part in here.parts) and root.is_relative_to(here.resolve()):
            return str(root.relative_to(here.resolve()))
        return str(root)


def find(build: str, path: str | None, where: str) -> UserCode:
    """Find the code that `build`, `module:function`, names. Runs none of it.

    ConfigError at the key `where` for another form, a module that is nowhere, and source that cannot be read.
    """
    module, colon, function = build.partition(":")
    if not (colon and all(map(_PLAIN, module.split("."))) and _PLAIN(function)):
        raise code_error(where, f"{build!r}: must have the form module:function, e.g. mynets:encoder", build)
    roots = dict.fromkeys(Path(root).expanduser() for root in (path, ".") if root is not None)
    for root in roots:
        file = _file_of(root, module)
        if file is not None:
            files = tuple(sorted(_closure(root, file, where)))
            return UserCode(module, function, root, files, _digest(root, files))
    package_root = _installed_root(module)
    if package_root is None:
        close = did_you_mean(module, sorted({file.stem for root in roots for file in root.glob("*.py")}))
        places = " and ".join(str(root.resolve()) for root in roots)
        raise code_error(
            where,
            f"{build!r}: there is no module {module!r} in {places}, nor is it an installed package{close}",
            build,
        )
    files = _package_files(package_root, module.partition(".")[0])
    return UserCode(module, function, package_root, files, _digest(package_root, files), installed=True)


def other_source(where: str, wanted: str, code: UserCode) -> ConfigError:
    """Return a ConfigError for source that is not what a run or a configuration says."""
    return code_error(
        where,
        f"the source of {code.module} in {code.root.resolve()} has the digest {code.digest}, not {wanted}: it has "
        "changed since; run again",
        wanted,
    )


def module_name(file: str) -> str:
    """The name that a file is imported under."""
    return ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")


def _file_of(root: Path, module: str) -> Path | None:
    stem = root.joinpath(*module.split("."))
    for candidate in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
        if candidate.is_file():
            return candidate
    return None


def _closure(root: Path, first: Path, where: str) -> set[str]:
    """Names of the files below `root` that importing `first` may import, wherever in their text."""
    found: set[str] = set()
    open_files = [first, *_packages_above(root, first)]
    while open_files:
        file = open_files.pop()
        name = file.relative_to(root).as_posix()
        if name in found:
            continue
        found.add(name)
        for module in _imports(file, root, where):
            target = _file_of(root, module)
            if target is not None:
                open_files += [target, *_packages_above(root, target)]
    return found


def _packages_above(root: Path, file: Path) -> list[Path]:
    folders = [folder for folder in file.parents if folder != root and folder.is_relative_to(root)]
    return [folder / "__init__.py" for folder in folders if (folder / "__init__.py").is_file()]


def _imports(file: Path, root: Path, where: str) -> Iterator[str]:
    """Absolute names of what a file may import; of `from a import b` both `a` and `a.b`."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise code_error(where, f"{file}: cannot be read as Python: {error}") from error
    package = list(file.relative_to(root).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if name:
                yield name
            yield from (f"{name}.{alias.name}".lstrip(".") for alias in node.names)


def _installed_root(module: str) -> Path | None:
    """The folder in which the package that has a module is installed; None where there is none, or it has no source."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        # What a configuration names it runs: it shall not be able to run a program by its arguments alone.
        return None
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    origin = Path(spec.origin)
    return origin.parent.parent if origin.name == "__init__.py" else origin.parent


def _package_files(root: Path, top: str) -> tuple[str, ...]:
    folder = root / top
    if not folder.is_dir():
        return (f"{top}.py",)
    return tuple(sorted(path.relative_to(root).as_posix() for path in folder.rglob("*.py")))


def _digest(root: Path, files: tuple[str, ...]) -> str:
    total = hashlib.sha256()
    for name in files:
        content = (root / name).read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def code_error(where: str, message: str, value: object = None) -> ConfigError:
    """Return a ConfigError at the key `where`."""
    return ConfigError(f"{where}: {message}", where=where, value=value)
