"""Damage the files of small runs in every way, one a time, and see what each command makes of it.

    python tests/support/damage.py [--count 1000] [--seed 0] [--seconds 0] [--only PATTERN] [--workers 1]

A finished and a half-finished run are made once. For every mutation a copy is damaged, and `status`, `report`, `export`
and `run` are called on it in a fork of this process, so that nothing is imported twice. What must not happen:

    traceback   anything but our own typed errors, printed plainly
    wrong       a command that says it went well, with other weights or scores than those of the run left alone
    hang        longer than LIMIT_S, or LIMIT_CPU_S of computing
    memory      more than LIMIT_BYTES beyond what the process had
    written     a file behind a symbolic link was changed

Prints one JSON line for each of these, and counts at the end. Mutation n of a seed is always the same.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import fnmatch
import io
import json
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_svg import FigureCanvasSVG

from cache_store import crashpoints
from cache_store.records.record_io import dump_record
from orchestrator.cli import main

#: Most seconds of the clock, on however busy a machine, and most seconds of computing.
LIMIT_S, LIMIT_CPU_S = 600.0, 60
LIMIT_BYTES = 1 << 30
_PR_SET_PDEATHSIG = 1
CONFIG: dict[str, Any] = {
    "model": {"family": "vit", "patch": 4, "layers": 3, "hidden": 16, "heads": 2, "mlp": 32},
    "data": {
        "name": "digits",
        "image_size": 8,
        "augment": "light",
        "flip": False,
        "views": 1,
        "validation": 16,
        "train_limit": 48,
        "test_limit": 16,
    },
    "split": {"base": 1, "head": 1},
    "training": {"epochs": 2, "batch_size": 16, "optimizer": {"lr": 1e-3}, "checkpoint_every_s": 1e-6},
    "snapshots": {"mode": "always", "group_rows": 16, "shard_bytes": 20_000, "retention": "keep"},
    "regimes": ["segprop", "e2e"],
    "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": 1},
}


@dataclass
class Answer:
    """What the commands made of one damaged copy: exit codes, and what must not happen."""

    codes: dict[str, int] = field(default_factory=dict)
    #: Kind of failure -> what was seen.
    failures: dict[str, str] = field(default_factory=dict)
    #: What a user was told first.
    told: str = ""


@dataclass(frozen=True)
class Base:
    """Runs as they should be: folders `finished` and `half` with a configuration, and what a run must end in."""

    folder: Path
    exports: dict[str, bytes]
    scores: dict[str, Any]

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"


# -- children -------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any], limit_s: float = LIMIT_S) -> tuple[Any, str, int]:
    """Call `work` in a fork; returns its JSON value, what went wrong with the process ("" for nothing) and the bytes by
    which it grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        with contextlib.suppress(BaseException), os.fdopen(writable, "w") as answer:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S))
            json.dump(work(), answer)
        os._exit(0)
    os.close(writable)
    data, wrong, deadline = b"", "", time.monotonic() + limit_s
    while True:
        ready, _, _ = select.select([readable], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            wrong = "hang"
            break
        piece = os.read(readable, 1 << 20)
        if not piece:
            break
        data += piece
    os.close(readable)
    _, status, usage = os.wait4(pid, 0)
    if not wrong and (status != 0 or not data):
        wrong = "hang" if usage.ru_utime + usage.ru_stime > LIMIT_CPU_S - 1 else f"ended by {status}"
    return (json.loads(data) if data else None), wrong, max(0, usage.ru_maxrss - before) << 10


def call(*arguments: str) -> tuple[int, str, str]:
    """Call the program; returns its exit code, what it wrote to standard error, and a traceback where one escaped."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code, trace = main(list(arguments)), ""
        except BaseException:  # noqa: BLE001 - whatever escapes is what is looked for
            code, trace = -1, traceback.format_exc()
    text = errors.getvalue()
    if "Traceback (most recent call last)" in text:
        trace = trace or text
    return code, text, trace


# -- the runs -------------------------------------------------------------------------------------------------------


def make_base(folder: Path) -> Base:
    """Make a finished and a half-finished run, which has checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({"run": "tiny", "run_dir": str(folder / "finished"), **CONFIG}, sort_keys=False))

    def finished() -> Any:
        return call("run", str(config), "--quiet")

    def half() -> Any:
        marker = str(folder / "killed")
        crashpoints._plans[:] = [("checkpoint.committed", 2, marker)]
        crashpoints._armed = True
        return call("run", str(config), "--quiet", f"run_dir={folder / 'half'}")

    (code, told, trace), wrong, _ = in_child(finished, 600)
    if code or wrong:
        raise SystemExit(f"the run itself fails: {code} {wrong} {told} {trace}")
    in_child(half, 600)
    if not list((folder / "half").glob("store/nodes/*/checkpoints/*/*/manifest.json")):
        raise SystemExit("the half-finished run has no checkpoint")
    return Base(folder, exports(folder / "finished"), scores(folder / "finished"))


def load_all(base: Base) -> None:
    """Import here what the commands need, so that no fork has to."""
    for arguments in _commands(base, base.folder / "finished").values():
        code, told, trace = call(*arguments)
        if code:
            raise SystemExit(f"{arguments[0]} of the run left alone fails: {told} {trace}")


def _commands(base: Base, run_dir: Path) -> dict[str, tuple[str, ...]]:
    return {
        "status": ("status", str(run_dir)),
        "report": ("report", str(run_dir)),
        "export": ("export", str(run_dir)),
        "run": ("run", str(base.config), "--quiet", f"run_dir={run_dir}"),
    }


def exports(run_dir: Path) -> dict[str, bytes]:
    """Files of tensors that a run has exported."""
    found = sorted((run_dir / "model").rglob("*.safetensors")) if (run_dir / "model").is_dir() else []
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in found if path.is_file()}


def scores(run_dir: Path) -> dict[str, Any]:
    """Scores of the regimes as the summary has them."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return {name: regime.get("test") for name, regime in summary["regimes"].items()}


# -- mutations ------------------------------------------------------------------------------------------------------

ABSURD: tuple[Any, ...] = (
    None,
    -1,
    0,
    10**400,
    1e300,
    "",
    "x" * 300,
    [],
    {},
    [[]],
    True,
    "../../x",
    {"a": None},
    2**63,
)
JSON_TEXTS = (b"null", b"[]", b"{}", b"7", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 6000, b'{"format": 1}')


def flip(path: Path, draw: random.Random, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random, others: list[Path]) -> None:
    size = path.stat().st_size
    os.truncate(path, draw.choice([0, 1, size // 2, max(0, size - 1), draw.randrange(size + 1)]))


def zero(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def duplicate(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.write_bytes(path.read_bytes() * 2)


def swap(path: Path, draw: random.Random, others: list[Path]) -> None:
    other = draw.choice([each for each in others if each.name == path.name and each != path] or others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def foreign(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.write_bytes(
        draw.choice([draw.randbytes(draw.randrange(1, 3000)), *JSON_TEXTS, draw.choice(others).read_bytes()])
    )


def remove(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.unlink()


def link_elsewhere(path: Path, draw: random.Random, others: list[Path]) -> None:
    elsewhere = _elsewhere(path)
    elsewhere.parent.mkdir(exist_ok=True)
    elsewhere.write_bytes(path.read_bytes() if draw.random() < 0.5 else b"of somebody else")
    path.unlink()
    path.symlink_to(elsewhere)


def link_nowhere(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.unlink()
    path.symlink_to(draw.choice(["/dev/zero", "/dev/null", str(path), str(path.parent), str(path) + ".gone"]))


def pipe(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, draw: random.Random, others: list[Path]) -> None:
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "inside").write_text("x")


def huge(path: Path, draw: random.Random, others: list[Path]) -> None:
    os.truncate(path, draw.choice([17 << 20, 5 << 30, 1 << 40]))


def parent_gone(path: Path, draw: random.Random, others: list[Path]) -> None:
    shutil.rmtree(path.parent)
    if draw.random() < 0.5:
        path.parent.write_text("a file now")


def absurd(path: Path, draw: random.Random, others: list[Path]) -> None:
    """Put an absurd value somewhere into a record, with a checksum that is right."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        try:
            record = yaml.safe_load(path.read_text())
        except (ValueError, yaml.YAMLError):
            return foreign(path, draw, others)
        if not isinstance(record, dict):
            return foreign(path, draw, others)
        _put(record, draw)
        path.write_text(yaml.safe_dump(record))
        return None
    if not isinstance(record, dict):
        return foreign(path, draw, others)
    sealed = record.pop("check", None) is not None
    _put(record, draw)
    try:
        path.write_bytes(dump_record(record, "damage") if sealed else json.dumps(record).encode())
    except Exception:  # noqa: BLE001 - such a number is not written
        path.write_bytes(b"9" * 6000)
    return None


def _put(record: Any, draw: random.Random) -> None:
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(record)
    if not places:
        return
    inside, key = draw.choice(places)
    if isinstance(inside, dict) and draw.random() < 0.2:
        del inside[key]
    else:
        inside[key] = draw.choice(ABSURD)


MUTATIONS: dict[str, Callable[[Path, random.Random, list[Path]], None]] = {
    "flip": flip,
    "truncate": truncate,
    "zero": zero,
    "duplicate": duplicate,
    "swap": swap,
    "foreign": foreign,
    "remove": remove,
    "link": link_elsewhere,
    "link to a device, itself or nothing": link_nowhere,
    "pipe": pipe,
    "folder": folder,
    "huge": huge,
    "parent": parent_gone,
    "absurd": absurd,
}
#: What these make may be a record of something else that is whole: no weights or scores are promised then.
FORGED = ("absurd",)


def _elsewhere(path: Path) -> Path:
    """A place outside the run directory for what a link leads to."""
    top = next(parent for parent in path.parents if parent.name == "run")
    return top.parent / "elsewhere" / path.name


def kind_of(name: str) -> str:
    """The kind of a file by its path in a run directory: ids and numbers left out."""
    parts = ["*" if any(c.isdigit() for c in part) and part not in ("e2e",) else part for part in name.split("/")]
    return "/".join(parts)


def kinds(run_dir: Path) -> dict[str, list[str]]:
    """Kind of file -> files of it."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path in sorted(run_dir.rglob("*")):
        if path.is_file():
            name = path.relative_to(run_dir).as_posix()
            found[kind_of(name)].append(name)
    return dict(found)


@dataclass(frozen=True)
class Mutation:
    """One mutation: of which run, which file, in which way, with which draws."""

    number: int
    run: str
    kind: str
    file: str
    way: str
    seed: int


def mutations(base: Base, seed: int, pattern: str = "*") -> Iterator[Mutation]:
    """Yield mutations without end: kinds of files and ways take turns in a shuffled order."""
    known = [
        (run, kind, names, way)
        for run in ("finished", "half")
        for kind, names in kinds(base.folder / run).items()
        if fnmatch.fnmatch(kind, pattern)
        for way in MUTATIONS
    ]
    number = 0
    while True:
        draw = random.Random(f"{seed}/{number}")
        draw.shuffle(known)
        for run, kind, names, way in known:
            yield Mutation(number, run, kind, draw.choice(names), way, draw.randrange(1 << 32))
            number += 1


# -- what is asked --------------------------------------------------------------------------------------------------


def judge(base: Base, mutation: Mutation, place: Path) -> Answer:
    """Damage a copy below `place` and see what the commands make of it."""
    run_dir = place / "run"
    shutil.copytree(base.folder / mutation.run, run_dir, symlinks=True)
    target = run_dir / mutation.file
    others = [run_dir / name for names in kinds(run_dir).values() for name in names if name != mutation.file]
    MUTATIONS[mutation.way](target, random.Random(mutation.seed), others)
    linked = {path: path.read_bytes() for path in (place / "elsewhere").glob("*")}
    answer, wrong, grown = in_child(lambda: asdict(_ask(base, mutation, run_dir)))
    found = Answer(**answer) if answer else Answer()
    if wrong:
        found.failures["hang" if wrong == "hang" else "killed"] = wrong
    if grown > LIMIT_BYTES:
        found.failures["memory"] = f"{grown >> 20} MB more"
    for path, data in linked.items():
        if path.read_bytes() != data:
            found.failures["written"] = f"{path.name} behind a link was changed"
    return found


def _ask(base: Base, mutation: Mutation, run_dir: Path) -> Answer:
    answer = Answer()
    commands = _commands(base, run_dir)
    if mutation.way not in FORGED:
        # Most of the time goes into drawing, which reads nothing.
        FigureCanvasSVG.print_svg = lambda _, file, **__: file.write('<svg viewBox="0 0 1 1"></svg>')
    for name, arguments in commands.items():
        _note(answer, name, *call(*arguments))
        if answer.codes[name] == 0 and mutation.way not in FORGED:
            _compare(answer, base, mutation, name, run_dir)
    if answer.codes["run"]:
        _note(answer, "verify", *call("cache", "verify", str(run_dir), "--repair"))
        _note(answer, "again", *call(*commands["run"]))
        if answer.codes["again"] == 0 and mutation.way not in FORGED:
            _compare(answer, base, mutation, "again", run_dir)
    return answer


def _note(answer: Answer, name: str, code: int, told: str, trace: str) -> None:
    answer.codes[name] = code
    if trace:
        answer.failures.setdefault("traceback", f"{name}: {trace[-1500:]}")
    elif code not in (0, 1, 2):
        answer.failures.setdefault("traceback", f"{name}: exit code {code}")
    elif code and "segprop: " not in told and name != "verify" and not told:
        answer.failures.setdefault("silent", f"{name}: exit code {code} without a word")
    if code and not answer.told:
        answer.told = f"{name}: {told.strip()[:300]}"


def _compare(answer: Answer, base: Base, mutation: Mutation, name: str, run_dir: Path) -> None:
    """A command that went well leaves what the run left alone has."""
    if name in ("run", "again", "export") and exports(run_dir) != base.exports:
        answer.failures.setdefault("wrong", f"{name}: other tensors")
    told_of_all = name in ("run", "again") or (name == "report" and mutation.run == "finished")
    if told_of_all:
        try:
            done = json.loads((run_dir / "summary.json").read_text())["status"] == "done"
            if done and scores(run_dir) != base.scores:
                answer.failures.setdefault("wrong", f"{name}: other scores")
        except (OSError, ValueError, KeyError) as error:
            answer.failures.setdefault("wrong", f"{name}: no summary: {error}")


# -- the program ----------------------------------------------------------------------------------------------------


def outcome(answer: Answer) -> str:
    """One word for what became of a mutation."""
    if answer.failures:
        return next(iter(answer.failures))
    if not any(answer.codes.values()):
        return "right at once"
    if answer.codes["run"] == 0:
        return "told, then right by `run`"
    return "told, then right by `cache verify --repair` and `run`" if answer.codes["again"] == 0 else "told"


def attack(
    base: Base, *, count: int, seed: int, pattern: str = "*", seconds: float = 0, part: int = 0, of: int = 1
) -> tuple[collections.Counter[str], list[dict[str, Any]]]:
    """Judge `count` mutations of a seed, or as many as fit into `seconds`; every `of`-th from `part` on."""
    counts: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, Any]] = []
    end = time.monotonic() + seconds if seconds else None
    for mutation in mutations(base, seed, pattern):
        if mutation.number >= count or (end is not None and time.monotonic() > end):
            break
        if mutation.number % of != part:
            continue
        with tempfile.TemporaryDirectory(prefix="sp-damage-", dir=base.folder.parent) as place:
            answer = judge(base, mutation, Path(place))
        counts[outcome(answer)] += 1
        if answer.failures:
            failures.append({**asdict(mutation), **asdict(answer)})
            print(json.dumps(failures[-1]), flush=True)
        if counts.total() % 10 == 0:
            print(f"part {part}: {counts.total()} mutations, {dict(counts)}", file=sys.stderr, flush=True)
    return counts, failures


def _program() -> int:
    parser = argparse.ArgumentParser(description="Damage the files of small runs and see what the commands make of it.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--only", default="*", help="Kinds of files, such as store/nodes/*.")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sp-damage-", dir=memory) as folder:
        base = make_base(Path(folder) / "base")
        options = {"count": given.count, "seed": given.seed, "pattern": given.only, "seconds": given.seconds}
        load_all(base)
        with multiprocessing.get_context("fork").Pool(given.workers) as pool:
            parts = [
                pool.apply_async(attack, (base,), {**options, "part": part, "of": given.workers})
                for part in range(given.workers)
            ]
            found = [part.get() for part in parts]
    counts = sum((part for part, _ in found), collections.Counter[str]())
    failures = [failure for _, part in found for failure in part]
    print(f"{counts.total()} mutations from seed {given.seed}:")
    for name, number in counts.most_common():
        print(f"  {number:6d}  {name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(_program())
