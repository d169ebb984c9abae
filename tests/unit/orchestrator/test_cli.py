"""How the program ends."""

from __future__ import annotations

import subprocess
import sys

# Enough to begin with, and nothing for what the command then imports.
STARVED = """
import resource, sys
from orchestrator.cli import main
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(["schema"]))
"""


def test_a_machine_without_memory_is_told_in_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, check=False, timeout=120)
    told = "segprop: this machine has no memory left; the same command goes on where it ended\n"
    assert (done.returncode, done.stderr) == (1, told)
