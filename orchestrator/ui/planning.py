"""Make the plan of a configuration for the page: `segprop plan` in a process of its own, one at a time.

A process, because a configuration may name functions to run, planning may take gigabytes for a moment, and a server
that imports neither torch nor transformers starts at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from cache_store.errors import SegpropError

#: Seconds after which a plan is given up, and characters of one that are shown.
MOST_S, MOST_TEXT = 300.0, 1 << 20


@dataclass(frozen=True)
class PlanText:
    """What `segprop plan` said: the plan, or why there is none."""

    text: str
    made: bool


class Planner:
    """Makes one plan at a time."""

    def __init__(self, most_s: float = MOST_S) -> None:
        self._most_s = most_s
        self._busy = threading.Lock()

    def plan(self, config: Path) -> PlanText:
        """Plan a file. SegpropError while another plan is made, or when it takes too long."""
        if not self._busy.acquire(blocking=False):
            raise SegpropError("another plan is being made; try again when it is there")
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "orchestrator.cli", "plan", "--", str(config)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._most_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SegpropError(f"{config.name}: no plan after {self._most_s:.0f} s; try `segprop plan`") from error
        finally:
            self._busy.release()
        made = done.returncode == 0
        return PlanText((done.stdout if made else done.stderr or done.stdout)[:MOST_TEXT], made)
