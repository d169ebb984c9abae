"""YAML as plain data that remembers the line of every key.

A deliberate subset, so that what a file seems to say is what it says: `1e-3` is a number, `on` and `yes` are
text, dates are text, keys are text and unique, no tags, no merge keys, no control characters, bounded size, depth and
numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cache_store.errors import ConfigError, UserError
from cache_store.storage.addresses import redacted
from workers.models.base import Finding

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 32
#: Whole numbers lie between minus this and this, as in every format that they are written to.
MAX_NUMBER = 1 << 63
#: Problems that a message lists; the others are counted.
MAX_LISTED = 50
#: Longer keys and overrides are cut in messages.
_LONG_KEY = 200
_WORDS_OF_NUMBERS = "must be a finite number, a whole one below 2^63"


def leaves(section: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the settings of a section by dotted key; lists and empty sections are values."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        path = f"{above}{key}"
        found |= leaves(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return found


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration. `line` is None for what came from the command line."""

    path: KeyPath
    message: str
    line: int | None = None
    #: Where it comes from when not from a line of the file, e.g. `override training.epochs=x`.
    origin: str | None = None

    def __str__(self) -> str:
        where = self.origin if self.origin is not None else f"line {self.line}" if self.line else None
        return ": ".join(text for text in (where, _cut(key_text(self.path), _LONG_KEY), self.message) if text)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": key_text(self.path),
            "line": self.line,
            "origin": self.origin,
            "message": self.message,
        }


@dataclass
class Document:
    """A parsed file with its overrides applied. `lines` and `origins` say where each key path was written."""

    source: str
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem located at `path` or at the nearest key above it that was written down."""
        for length in range(len(path), 0, -1):
            prefix = path[:length]
            if prefix in self.origins:
                return Problem(path, message, origin=self.origins[prefix])
            if prefix in self.lines:
                return Problem(path, message, line=self.lines[prefix])
        # A section that only an override made.
        below = (origin for key, origin in self.origins.items() if path and key[: len(path)] == path)
        return Problem(path, message, origin=next(below, None))

    def located(self, findings: Iterable[Finding]) -> list[Problem]:
        """Each finding as a problem, with the line or the override it comes from."""
        return [self.problem(path, message) for path, message in findings]


def key_text(path: KeyPath) -> str:
    """`("model", "segments", 0)` as `model.segments[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def raise_problems(source: str, problems: Iterable[Problem], kind: type[UserError] = ConfigError) -> None:
    """Raise one error that lists every problem in the order of the file; nothing when there is none."""
    unique = list(dict.fromkeys(problems))
    if not unique:
        return
    unique.sort(key=lambda problem: (problem.line is None, problem.line or 0))
    count = f"{len(unique)} problem{'s' if len(unique) > 1 else ''}"
    listing = "\n".join(f"  {problem}" for problem in unique[:MAX_LISTED])
    if len(unique) > MAX_LISTED:
        listing += f"\n  … and {len(unique) - MAX_LISTED} more"
    raise kind(f"{source}: {count}\n{listing}", problems=[problem.to_json() for problem in unique])


def load_document(path: str | Path) -> Document:
    """Read a file. Raises ConfigError where the file cannot be read or is not YAML at all; whatever else is
    wrong is collected in `Document.problems`."""
    source = str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES} bytes; a configuration is a few kilobytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text (byte {error.start})") from error
    return parse_document(text, source)


def parse_document(text: str, source: str = "<text>") -> Document:
    """`text` as a Document. Raises ConfigError when it is not YAML."""
    document = Document(source, {})
    root = _compose(text, source)
    if root is None:
        return document
    value = _Builder(document).build(root, (), 0)
    if isinstance(value, dict):
        document.data = value
    else:
        document.problems.append(
            Problem((), f"{_short(value)}: must be a mapping of keys to values", line=root.start_mark.line + 1)
        )
    return document


def apply_overrides(document: Document, overrides: Sequence[str], word: str = "override") -> None:
    """Set `a.b.c=value` in place; sections on the way are created. Bad ones are collected as problems, which begin
    with `word`."""
    for override in overrides:
        origin = f"{word} {_cut(redacted(override), _LONG_KEY)}"
        key, separator, text = override.partition("=")
        parts: KeyPath = tuple(part.strip() for part in key.split("."))
        if not separator or not all(parts):
            document.problems.append(Problem((), "must have the form key.subkey=value", origin=origin))
            continue
        try:
            root = _compose(text, origin)
        except ConfigError as error:
            document.problems.append(Problem(parts, error.message.partition(": ")[2], origin=origin))
            continue
        scratch = Document(origin, {})
        value = None if root is None else _Builder(scratch).build(root, (), 0)
        document.problems += [Problem(parts + found.path, found.message, origin=origin) for found in scratch.problems]
        _assign(document, parts, value, origin)


def _assign(document: Document, parts: KeyPath, value: Any, origin: str) -> None:
    target: Any = document.data
    for depth, part in enumerate(parts[:-1], start=1):
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            message = f"{key_text(parts[:depth])} is {_short(target)}, which has no keys"
            document.problems.append(Problem(parts, message, origin=origin))
            return
    target[parts[-1]] = value
    # What stood below the replaced key is gone, and so are its lines.
    for path in [path for path in (*document.lines, *document.origins) if path[: len(parts)] == parts]:
        document.lines.pop(path, None)
        document.origins.pop(path, None)
    document.origins[parts] = origin


class _Loader(yaml.SafeLoader):
    """Scanner and parser of PyYAML with the scalar rules of YAML 1.2 (core schema, plus 1_000)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class-level registry


_INT = re.compile(r"[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)$"
)
_SPECIAL = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
#: Longer ones are out of range whatever they say, leading zeros aside.
_LONG_NUMBER = 60
#: Control characters but for tab and new line, and halves of surrogate pairs, which no encoding can write.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
for _tag, _pattern, _first in (
    ("bool", _BOOL, list("tTfF")),
    ("null", _NULL, ["~", "n", "N", ""]),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("special", _SPECIAL, list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        # Composed, never constructed: no object of any tag is ever made.
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        detail = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: {where}not valid YAML: {detail}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    return node


class _Builder:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def build(self, node: yaml.Node, path: KeyPath, depth: int) -> Any:
        self.nodes += 1
        line = node.start_mark.line + 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:  # also stops self-referring and multiplying aliases
            if not any(problem.message.startswith("too large") for problem in self.document.problems):
                self._complain(path, line, f"too large: more than {MAX_DEPTH} levels or {MAX_NODES} values")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.document.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self.build(item, (*path, index), depth + 1))
            return items
        return self._scalar(node, path, line)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(path, line, "keys must be plain text")
                continue
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                self._complain((*path, key), line, f"{key!r} is not text; keys must be text (quote it)")
                continue
            if _UNPRINTABLE.search(key):
                self._complain(path, line, f"{_short(key)}: a key holds a control character; allowed: printable text")
                continue
            if key == "<<":
                self._complain((*path, key), line, "merge keys are not supported; write the keys out")
                continue
            here = (*path, key)
            if key in result:
                first = self.document.lines[here]
                self._complain(here, line, f"duplicate key, first set on line {first}")
                continue
            self.document.lines[here] = line
            result[key] = self.build(value_node, here, depth + 1)
        return result

    def _scalar(self, node: yaml.Node, path: KeyPath, line: int) -> Any:
        text: str = node.value
        kind = node.tag.rpartition(":")[2]
        if kind == "str" or node.tag == "!":
            if _UNPRINTABLE.search(text):
                self._complain(path, line, f"{_short(text)}: holds a control character; allowed: printable text")
                return None
            return text
        if kind == "null" and _NULL.match(text):
            return None
        if kind == "bool" and _BOOL.match(text):
            return text.lower() == "true"
        if kind == "int" and _INT.match(text):
            plain = text.replace("_", "")
            if len(plain) < _LONG_NUMBER:
                number = int(plain, 16 if "x" in plain else 10)
                if -MAX_NUMBER < number < MAX_NUMBER:
                    return number
        elif kind in ("int", "float") and _FLOAT.match(text):
            value = float(text.replace("_", ""))
            if math.isfinite(value):
                return value
        if kind in ("int", "float", "special"):
            self._complain(path, line, f"{_cut(text, _LONG_NUMBER)}: {_WORDS_OF_NUMBERS}")
        else:
            self._complain(path, line, f"tag {node.tag} is not supported")
        return None

    def _complain(self, path: KeyPath, line: int, message: str) -> None:
        self.document.problems.append(Problem(path, message, line=line))


def _short(value: Any) -> str:
    return _cut(repr(value), 60)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
