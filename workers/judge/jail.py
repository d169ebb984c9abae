"""What `sandbox.run` starts as `python -I -S jail.py VERDICT_FD`: confines itself, then runs one program.

The request is one JSON value on standard input: `program`, `token`, `folder`, `modules` (folders that imports may
come from beside the standard library), `limits`, `demanded` (which of network, files and processes must be isolated)
and `without` (layers not to use). On the verdict pipe it answers in JSON lines: the layers it achieved, then how the
program ended. The token proves that the last line was written after the program had returned: one that calls `exit()`
half way through its own tests has not passed. (It guards against accidents, not against forged verdicts.)
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import types
from typing import Any

_HERE = os.path.abspath(__file__)
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))


def main() -> None:
    sys.path.insert(0, _ROOT)
    from workers.judge import confine

    sys.path.remove(_ROOT)
    verdict = int(sys.argv[1])
    request = json.load(sys.stdin)
    confine.die_with_parent()
    without = set(request["without"])
    layers = set() if "namespaces" in without else confine.namespaces()
    # Twice: the first child is the init of the process namespace, whose end takes everything in it along; signals
    # that would end the program never reach an init, so the program is its child.
    for _ in range(2):
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) % 256)
        confine.die_with_parent()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if "mounts" in layers and confine.read_only_files(request["folder"]):
        layers.add("read_only")
    confine.no_new_privileges()
    if "landlock" not in without and confine.landlock(request["folder"]):
        layers.add("landlock")
    _limit(request["limits"])
    if "seccomp" not in without and confine.seccomp():
        layers.add("seccomp")
    isolated = {what for what, any_of in _ISOLATES.items() if layers & any_of}
    if os.getuid() == 0 and "seccomp" not in layers:
        isolated.discard("processes")  # limits on their number do not bind root
    missing = sorted(set(request["demanded"]) - isolated)
    _tell(verdict, {"layers": sorted(layers), "isolated": sorted(isolated), "missing": missing})
    if not missing:
        ended = _run(request)
        with contextlib.suppress(Exception):  # it may have put anything in its place
            sys.stdout.flush()
        _tell(verdict, ended)
    os._exit(0)


#: Each of these is enough for what it is listed under.
_ISOLATES = {
    "network": {"network", "seccomp"},
    "files": {"read_only", "landlock"},
    "processes": {"processes", "seccomp"},
}


def _limit(limits: dict[str, int]) -> None:
    kinds = {
        "memory_bytes": resource.RLIMIT_AS,
        "cpu_seconds": resource.RLIMIT_CPU,
        "file_bytes": resource.RLIMIT_FSIZE,
        "processes": resource.RLIMIT_NPROC,
        "open_files": resource.RLIMIT_NOFILE,
        "core_bytes": resource.RLIMIT_CORE,
    }
    for name, value in limits.items():
        _, most = resource.getrlimit(kinds[name])
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kinds[name], (value, value))


def _run(request: dict[str, Any]) -> dict[str, Any]:
    sys.path += request["modules"]
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(request["program"], "<program>", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001  whatever it raises, SystemExit too, it has not passed
        try:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        except Exception:  # noqa: BLE001  a __str__ of its own
            reason = type(error).__name__
        return {"failed": reason[:500]}
    return {"passed": request["token"]}


def _tell(verdict: int, value: dict[str, Any]) -> None:
    os.write(verdict, json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    main()
