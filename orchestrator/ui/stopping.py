"""Ask a run's driver to stop, as Ctrl-C in its terminal does: it checkpoints what is under way and ends.

What a store says of a driver is not believed blindly, since whoever may write to the store could name any process: the
process must be on this machine, the one that took the run (by its start), and have the run's log open."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from cache_store.errors import UserError
from orchestrator.execution.event_log import FILE as LOG_FILE
from orchestrator.execution.run_lease import Held, Identity, read_held
from orchestrator.ui.run_view import WatchedRun

#: Drivers that were asked, so that none is asked twice: a second signal ends it at once.
_ASKED: set[Identity] = set()


def stop(run: WatchedRun, number: int) -> str:
    """Ask the driver with this number; returns what was done, in a sentence. UserError where that cannot be done from
    here, with what to do instead."""
    observer = run.observer()
    held = read_held(observer.storage, observer.digest)
    if held is None or held.ended or held.number != number:
        raise UserError("That driver is not at work any more; nothing was done.")
    pid = held.identity.pid
    by_hand = f"To stop it: `kill {pid}` on {held.identity.host}, where it runs, or Ctrl-C in its terminal."
    try:
        process = os.pidfd_open(pid)
    except (OSError, AttributeError) as error:
        raise UserError(f"{_who(held)} cannot be reached from here. {by_hand}") from error
    try:
        # From here on the number is this process's, whatever ends meanwhile.
        if held.identity.is_alive() is not True:
            raise UserError(f"{_who(held)} does not live on this machine. {by_hand}")
        if not has_open(pid, run.run_dir / LOG_FILE):
            raise UserError(f"{_who(held)} does not have {LOG_FILE} of this run open, so it is left alone. {by_hand}")
        if held.identity in _ASKED:
            return f"{_who(held)} was asked already. It ends when what is under way is checkpointed."
        signal.pidfd_send_signal(process, signal.SIGTERM)
    except PermissionError as error:
        raise UserError(f"{_who(held)} is another user's. {by_hand}") from error
    finally:
        os.close(process)
    _ASKED.add(held.identity)
    return f"{_who(held)} was asked to stop. It ends when what is under way is checkpointed; the same command goes on."


def has_open(pid: int, path: Path) -> bool:
    """Tell whether a process has a file open. PermissionError where that may not be known."""
    wanted = path.stat()
    folder = Path(f"/proc/{pid}/fd")
    for name in os.listdir(folder):
        try:
            found = (folder / name).stat()
        except OSError:
            continue  # closed meanwhile
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _who(held: Held) -> str:
    words = held.words()
    return words[0].upper() + words[1:]
