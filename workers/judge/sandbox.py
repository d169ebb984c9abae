"""Run code that a model has written, in a process of its own that can reach neither network nor files nor us.

`run` starts `jail.py`, which confines itself before it executes anything (see `confine.py` for the layers), and
kills it with all that belongs to it when the time is up. Where the machine cannot isolate network, files and
processes the program is not run at all, unless that is explicitly allowed.

What remains open: the program may *read* files that the calling user may read, but no device and no other process (it
has no way to send them anywhere, and its output is cut and shown to the user alone), and use one core while its time
lasts.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache_store.errors import SegpropError, UserError

_JAIL = Path(__file__).with_name("jail.py")
_DEMANDED = ("files", "network", "processes")
_VERDICT_BYTES = 1 << 16
#: Seconds between two looks at what a program has written where no memory disk bounds it.
_LOOK_S = 0.1

ExecutionOutcome = Literal["passed", "failed", "timeout", "died"]
IsolationLayer = Literal["namespaces", "landlock", "seccomp"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    #: All its files together, and how many they may be: held by a memory disk, or by looking ten times a second.
    folder_bytes: int = 64 << 20
    folder_files: int = 1024
    output_bytes: int = 1 << 14
    processes: int = 16
    open_files: int = 64


@dataclass(frozen=True)
class Execution:
    """How a program ended: `passed` (it returned), `failed` (it raised, or ended itself), `timeout`, `died` (killed
    by a limit or a fault). `output` is the beginning of what it printed."""

    outcome: ExecutionOutcome
    reason: str
    output: str
    seconds: float
    isolated: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run(
    program: str,
    limits: Limits = Limits(),
    *,
    allow_code_execution: bool,
    allow_unisolated: bool = False,
    modules: Sequence[str] = (),
    without: Sequence[IsolationLayer] = (),
) -> Execution:
    """Execute the Python source `program`, alone, in an empty folder; safe to call from several threads.

    `modules`: folders that imports may come from beside the standard library. `without`: layers not to use, as on a
    machine that lacks them. UserError when code execution is not
    allowed, or when the machine cannot isolate it and `allow_unisolated` is false."""
    demand(allow_code_execution)
    token = secrets.token_hex(16)
    with _empty_folder() as folder:
        request = {
            "program": program,
            "token": token,
            "folder": folder,
            "modules": list(modules),
            "without": list(without),
            "demanded": [] if allow_unisolated else _DEMANDED,
            "limits": {
                "memory_bytes": limits.memory_bytes,
                "cpu_seconds": math.ceil(limits.seconds),
                "file_bytes": limits.file_bytes,
                "processes": limits.processes,
                "open_files": limits.open_files,
                "core_bytes": 0,
            },
        }
        return _execute(request, folder, limits)


def demand(allow_code_execution: bool) -> None:
    """Raise UserError unless the user has said that generated code may run."""
    if not allow_code_execution:
        raise UserError(
            "allow_code_execution: false: this task runs programs that a language model has written. They run without "
            "network, without write access to files and under limits, but they are nobody's code: set "
            "allow_code_execution: true (--allow-code-execution) to run them"
        )


def _execute(request: dict[str, Any], folder: str, limits: Limits) -> Execution:
    started = time.monotonic()
    receiving, sending = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_JAIL), str(sending)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={},
            pass_fds=(sending,),
            start_new_session=True,
        )
    except BaseException:
        os.close(receiving)
        raise
    finally:
        os.close(sending)
    stdin, stdout = process.stdin, process.stdout
    try:
        if stdin is None or stdout is None:
            raise SegpropError("the jail for generated code was started without pipes")
        with contextlib.suppress(BrokenPipeError):  # it has died already; its output says why
            stdin.write(json.dumps(request).encode())
            stdin.close()
        heard = _listen(stdout.fileno(), receiving, folder, limits, started + limits.seconds)
    finally:
        # Everything it started is in its session, and dies with its init where it has one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if stdout is not None:
            stdout.close()
        os.close(receiving)
    return _judge(request, heard, process.returncode, time.monotonic() - started)


@dataclass(frozen=True)
class _Heard:
    """What a program said: the beginning of its output and of its verdict; whether it ended in time, and whether it
    was stopped for what it wrote."""

    output: str
    told: bytes
    in_time: bool
    too_much: bool


def _listen(printed: int, verdict: int, folder: str, limits: Limits, deadline: float) -> _Heard:
    """Read output and verdict until both are closed or time is up; what exceeds the bounds is read and dropped."""
    kept = {printed: bytearray(), verdict: bytearray()}
    bounds = {printed: limits.output_bytes, verdict: _VERDICT_BYTES}
    in_time, too_much = True, False
    with selectors.DefaultSelector() as selector:
        for handle in kept:
            selector.register(handle, selectors.EVENT_READ)
        while selector.get_map():
            remaining = deadline - time.monotonic()
            in_time, too_much = remaining > 0, _exceeds(folder, limits)
            if not in_time or too_much:
                break
            for key, _ in selector.select(min(remaining, _LOOK_S)):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                room = bounds[key.fd] - len(kept[key.fd])
                kept[key.fd] += data[:room]
    output, told = kept.values()
    return _Heard(output.decode(errors="replace"), bytes(told), in_time, too_much or _exceeds(folder, limits))


def _exceeds(folder: str, limits: Limits) -> bool:
    """Whether the files below a folder are too many or too large together. Looks no further than it must."""
    waiting, files, size = [folder], 0, 0
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                files += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                if files > limits.folder_files or size > limits.folder_bytes:
                    return True
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return False


@contextlib.contextmanager
def _empty_folder() -> Iterator[str]:
    """A folder for one program, gone afterwards with whatever it made there."""
    folder = tempfile.mkdtemp(prefix="segprop-jail-")
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: str) -> None:
    """Delete a folder, however deep it is: what a folder inside it holds moves up before that goes."""
    number = 0
    with contextlib.suppress(OSError):
        while entries := list(os.scandir(folder)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for inner in list(os.scandir(entry.path)):
                    number += 1
                    os.rename(inner.path, os.path.join(folder, f"moved-{secrets.token_hex(8)}-{number}"))
                os.rmdir(entry.path)
        os.rmdir(folder)


def _judge(request: dict[str, Any], heard: _Heard, code: int, seconds: float) -> Execution:
    lines, output, in_time = heard.told.splitlines(), heard.output, heard.in_time
    setup = _json(lines[0]) if lines else {}
    if setup.get("missing"):
        raise UserError(
            f"this machine cannot isolate {' and '.join(setup['missing'])} for generated code (it has neither user "
            "namespaces nor seccomp and Landlock for that), so it is not run; in a throw-away machine or container "
            "set allow_unisolated: true (--allow-unisolated) to run it all the same"
        )
    if not setup and in_time and not heard.too_much:
        raise SegpropError(f"the jail for generated code did not start (status {code}): {output[-500:]}")
    isolated = tuple(setup.get("isolated", ()))
    if heard.too_much:
        return Execution("failed", "wrote more files, or more into them, than it may", output, seconds, isolated)
    last = _json(lines[-1]) if len(lines) > 1 else {}
    if secrets.compare_digest(str(last.get("passed")), request["token"]):
        return Execution("passed", "", output, seconds, isolated)
    if "failed" in last:
        return Execution("failed", str(last["failed"]), output, seconds, isolated)
    if not in_time:
        return Execution("timeout", f"not finished after {seconds:.1f} s", output, seconds, isolated)
    if code == 0:
        return Execution("failed", "ended itself before its tests were through", output, seconds, isolated)
    if code % 256 == 256 - signal.SIGXCPU or code % 256 == 256 - signal.SIGKILL:
        return Execution("timeout", "used up its processor time", output, seconds, isolated)
    return Execution("died", f"status {code}", output, seconds, isolated)


def _json(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # the program may have written anything there
        return {}
    return value if isinstance(value, dict) else {}
