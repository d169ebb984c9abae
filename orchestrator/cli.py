"""The segprop program: puts the commands together, and ends with their exit code.

Exit codes: 0 done, 1 failed, 2 bad input. Only errors of `cache_store.errors` are expected; they are printed
plainly. Everything heavy is imported inside the command that needs it, so help and dry runs are quick.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from cache_store.errors import SegpropError
from orchestrator.cache import commands as cache
from orchestrator.commands import beginning, looking, models, running
from orchestrator.env_file import load_env_file

app = typer.Typer(
    name="segprop",
    help="Train networks segment by segment on Ray: SegProp, end-to-end and layer-wise, side by side.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(running.run, running.sweep, running.plan, running.profile),
    *(looking.status, looking.ui, looking.compare, looking.clean, looking.why, looking.report),
    *(models.export, models.push),
    *(beginning.init, beginning.schema, beginning.doctor),
    *(models.judge, models.generate),
):
    app.command()(command)
app.add_typer(cache.app, name="cache")
data_app = typer.Typer(help="Look at the data of a configuration.", no_args_is_help=True)
data_app.command()(beginning.show)
app.add_typer(data_app, name="data")


def main(arguments: Sequence[str] | None = None, program: str = "segprop") -> int:
    """Run the program and return its exit code."""
    load_env_file(Path())
    try:
        app(args=None if arguments is None else list(arguments), prog_name=program)
    except SegpropError as error:
        print(f"segprop: {error.message}", file=sys.stderr)
        return error.exit_code
    except (MemoryError, OSError, ImportError) as error:
        if not _is_memory(error):
            raise
        print("segprop: this machine has no memory left; the same command goes on where it ended", file=sys.stderr)
        return 1
    except SystemExit as stop:  # how typer ends every command, also after usage errors (2)
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _is_memory(error: Exception) -> bool:
    """Tell whether an error says that there is no memory: Python's own, the system's, or the loader's of a library."""
    if isinstance(error, ImportError):
        return "failed to map segment" in str(error) or "annot allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


if __name__ == "__main__":
    sys.exit(main())
