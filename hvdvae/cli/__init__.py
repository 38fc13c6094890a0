"""The command `hvdvae`: one file a subcommand; this one finds it and turns errors into one line and a status.

Heavy libraries are imported by the subcommand that needs them, so that --help answers at once.
"""

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hvdvae.abort import abort_job
from hvdvae.cli.standard_streams import lenient
from hvdvae.errors import BusyError, HvdvaeError, MisfitError, RankLost, WorldError
from hvdvae.launcher import Launch, detect, leave_launch
from hvdvae.signals import Terminated

USAGE_STATUS = 2
"""Exit status of an error that the user can mend."""
LOST_STATUS = 75
"""Of a job that a rank's death has ended, or that came too early (EX_TEMPFAIL, as of a deadline): start it again."""


def run() -> Any:
    """`main` in a process that it has to itself. Returns the exit status, 1 where its words were lost."""
    # What is imported stays to the end. To look through it for garbage is a tenth of a start, and 0.3 s at the end.
    gc.disable()
    sys.stderr, _ = lenient(sys.stderr)
    sys.stdout, output = lenient(sys.stdout, "standard output")
    try:
        status: Any = main(imported=_collect_from_now_on)
    except SystemExit as left:  # As --help does.
        status = left.code
    sys.stdout.flush()
    return status or int(output.failed)


def _collect_from_now_on() -> None:
    gc.freeze()
    gc.enable()


def main(argv: Sequence[str] | None = None, *, imported: Callable[[], None] | None = None) -> int:
    """Run the command line. Returns the exit status.

    `imported` is called once what the command needs is loaded.
    """
    from hvdvae.cli.parser import parse

    leave_launch(os.environ)
    try:
        command, options = parse(list(sys.argv[1:] if argv is None else argv))
        if imported is not None:
            imported()
        return command(options)
    except (RankLost, BusyError) as error:
        return _fail(str(error), LOST_STATUS)
    except MisfitError as error:
        return _fail(str(error), USAGE_STATUS, joins=True)
    except HvdvaeError as error:
        return _fail(str(error), USAGE_STATUS)
    except KeyboardInterrupt as interrupt:
        # In training Ctrl-C saves and leaves (signals.py); before and after it there is nothing to save.
        number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        return _fail(str(interrupt) or "interrupted", 128 + number)


def _fail(message: str, status: int, *, joins: bool = False) -> int:
    """Say the error, and end the other ranks, which may be waiting for this one; not those that it was to join."""
    try:
        launch = detect(os.environ)
    except WorldError:  # The message says it already, or will once the user has mended the first error.
        launch = Launch(launcher="none")
    if launch.rank > 0:
        # Most errors are the same on all ranks: the first says it, and its abort ends the others before they repeat it.
        time.sleep(1.0)
    # Of one that the others train on without, a supervisor must not think that the job ends.
    joins = joins or launch.enters
    what = "a new rank cannot join" if joins else "error"
    where = f" (rank {launch.rank} of {launch.size})" if launch.size > 1 else ""
    sys.stdout.flush()
    sys.stderr.write(f"hvdvae: {what}{where}: {message}\n")
    sys.stderr.flush()
    if launch.size > 1 and not joins:
        abort_job(status)
    return status
