"""Named places where tests kill the process, to show that nothing is lost or half written then.

Armed only by the environment variable ``SEGPROP_CRASH="<point>:<n>:<marker path>"``, several of them joined by
commas, read once when this module is imported. Unarmed, `reach` costs the test of one global bool. `driver.*`
points lie in the driver alone, `stage.*`, `shard.*`, `node.*` and `checkpoint.*` in workers, so that one
environment serves both.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

POINTS = (
    "storage.before-rename",
    "storage.before-link",
    "storage.after-link",
    "shard.written",
    "shard.committed",
    "node.written",
    "node.committed",
    "checkpoint.piece",
    "checkpoint.copied",
    "checkpoint.written",
    "checkpoint.committed",
    "stage.step",
    "stage.epoch",
    "driver.submitted",
    "driver.committed",
    "driver.before-release",
    "driver.after-release",
    "driver.exported",
)


def _parse(value: str) -> list[tuple[str, int, str]]:
    parsed = []
    for item in value.split(","):
        point, _, rest = item.partition(":")
        number, _, marker = rest.partition(":")
        if point not in POINTS or not number.isdigit() or int(number) < 1 or not marker:
            raise ValueError(
                f"SEGPROP_CRASH={item!r}: expected <point>:<n>:<marker path> with n >= 1 and a point out of "
                f"{', '.join(POINTS)}"
            )
        parsed.append((point, int(number), marker))
    return parsed


_setting = os.environ.get("SEGPROP_CRASH", "")
_armed = bool(_setting)
_plans = _parse(_setting) if _armed else []
_reached: Counter[str] = Counter()
_lock = threading.Lock()


def reach(name: str) -> None:
    """Kill this process (SIGKILL) if `name` is armed and this is its n-th reach here, once per marker file.

    The marker file is created exclusively first, so a restarted process with the same environment lives on.
    """
    if not _armed:
        return
    _reach_armed(name)


def _reach_armed(name: str) -> None:
    with _lock:
        _reached[name] += 1
        for point, number, marker in _plans:
            if name != point or _reached[name] != number:
                continue
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
