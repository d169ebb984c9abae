"""Run code that a model has written, in a process of its own that can reach neither network nor files nor us.

`run` starts `jail.py`, which confines itself before it executes anything (see `confine.py` for the layers), and
kills it with all that belongs to it when the time is up. Where the machine cannot isolate network, files and
processes the program is not run at all, unless that is explicitly allowed.

What remains open: the program may *read* what the calling user may read (it has no way to send it anywhere, and its
output is cut and shown to the user alone), and use one core for as long as its time lasts.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache_store.errors import SegpropError, UserError

_JAIL = Path(__file__).with_name("jail.py")
_DEMANDED = ("files", "network", "processes")
_VERDICT_BYTES = 1 << 16

ExecutionOutcome = Literal["passed", "failed", "timeout", "died"]
IsolationLayer = Literal["namespaces", "landlock", "seccomp"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
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
    with tempfile.TemporaryDirectory(prefix="segprop-jail-", ignore_cleanup_errors=True) as folder:
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
        output, told, in_time = _listen(stdout.fileno(), receiving, limits, started + limits.seconds)
    finally:
        # Everything it started is in its session, and dies with its init where it has one.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if stdout is not None:
            stdout.close()
        os.close(receiving)
    return _judge(request, told, output, in_time, process.returncode, time.monotonic() - started)


def _listen(printed: int, verdict: int, limits: Limits, deadline: float) -> tuple[str, bytes, bool]:
    """Read output and verdict until both are closed or time is up; what exceeds the bounds is read and dropped."""
    kept = {printed: bytearray(), verdict: bytearray()}
    bounds = {printed: limits.output_bytes, verdict: _VERDICT_BYTES}
    in_time = True
    with selectors.DefaultSelector() as selector:
        for handle in kept:
            selector.register(handle, selectors.EVENT_READ)
        while selector.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                in_time = False
                break
            for key, _ in selector.select(remaining):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fd)
                room = bounds[key.fd] - len(kept[key.fd])
                kept[key.fd] += data[:room]
    output, told = kept.values()
    return output.decode(errors="replace"), bytes(told), in_time


def _judge(request: dict[str, Any], told: bytes, output: str, in_time: bool, code: int, seconds: float) -> Execution:
    lines = told.splitlines()
    setup = _json(lines[0]) if lines else {}
    if setup.get("missing"):
        raise UserError(
            f"this machine cannot isolate {' and '.join(setup['missing'])} for generated code (it has neither user "
            "namespaces nor seccomp and Landlock for that), so it is not run; in a throw-away machine or container "
            "set allow_unisolated: true (--allow-unisolated) to run it all the same"
        )
    if not setup and in_time:
        raise SegpropError(f"the jail for generated code did not start (status {code}): {output[-500:]}")
    isolated = tuple(setup.get("isolated", ()))
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
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
