"""Named places where tests kill the process, to show that a killed writer leaves no half-written record.

Armed only by the environment variable ``SEGPROP_CRASH="<point>:<n>:<marker path>"``, read once when this
module is imported. Unarmed, `reach` costs the test of one global bool.
"""

from __future__ import annotations

import os
import signal
import threading

POINTS = (
    "storage.before-rename",
    "storage.before-link",
    "storage.after-link",
    "shard.written",
    "shard.committed",
    "node.written",
    "node.committed",
    "checkpoint.written",
    "checkpoint.committed",
)


def _parse(value: str) -> tuple[str, int, str]:
    point, _, rest = value.partition(":")
    number, _, marker = rest.partition(":")
    if not point or not number.isdigit() or int(number) < 1 or not marker:
        raise ValueError(f"SEGPROP_CRASH={value!r}: expected <point>:<n>:<marker path> with n >= 1")
    return point, int(number), marker


_setting = os.environ.get("SEGPROP_CRASH", "")
_armed = bool(_setting)
_point, _number, _marker = _parse(_setting) if _armed else ("", 0, "")
_reached = 0
_lock = threading.Lock()


def reach(name: str) -> None:
    """Kill this process (SIGKILL) if `name` is armed and this is its n-th reach here, once per marker file.

    The marker file is created exclusively first, so a restarted process with the same environment lives on.
    """
    if not _armed:
        return
    _reach_armed(name)


def _reach_armed(name: str) -> None:
    global _reached
    if name != _point:
        return
    with _lock:
        _reached += 1
        if _reached != _number:
            return
        try:
            os.close(os.open(_marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
