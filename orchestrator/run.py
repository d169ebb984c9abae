"""`python -m orchestrator.run CONFIG [key=value …] [--dry-run]`: the `run` command of the segprop program."""

from __future__ import annotations

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]], program="python -m orchestrator.run"))
