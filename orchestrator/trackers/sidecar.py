"""`python -m orchestrator.trackers.sidecar SERVICE`: fill one run of a service from JSON lines on standard input.

The first line is an `Opening`, every other one `[step, when, figures]`; the end of the input closes the run. Exit code
1, with the reason as the last line of standard error, when the service cannot be used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

from orchestrator.trackers.services import SERVICES, Opening


def main(service: str, lines: Iterable[str]) -> int:
    """Pass the lines on until there are no more."""
    try:
        source = iter(lines)
        opened = SERVICES[service](Opening(**json.loads(next(source))))
        for line in source:
            step, when, figures = json.loads(line)
            opened.log(step, when, figures)
        opened.close()
    except Exception as error:  # noqa: BLE001  whatever a service raises is said by whoever started this
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{type(error).__name__}: {text}"[:500], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.stdin))
