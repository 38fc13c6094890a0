"""An exception that nobody caught ends the whole job, its traceback first: the other ranks would wait for ever."""

import sys
import threading
import traceback
from types import TracebackType

from hvdvae.abort import abort_job

LONGEST = 1000
"""Characters of the line that says the cause."""


def end_job_on_uncaught_exception(rank: int, host: str) -> None:
    """From now on, in all threads of this process. Mutates sys.excepthook and threading.excepthook."""

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        cause = " ".join("".join(traceback.format_exception_only(kind, error)).split())[:LONGEST]
        # In one line, too, which `hvdvae supervise` says once more behind the lines of MPI's launcher.
        last = f"hvdvae: the cause, on rank {rank} ({host}): {cause}\n"
        sys.stderr.write(f"hvdvae: uncaught exception on rank {rank} ({host}):\n{text}{last}")
        abort_job(1)

    def end_from_thread(hook: threading.ExceptHookArgs) -> None:
        if hook.exc_value is not None and getattr(hook.thread, "exception", None) is hook.exc_value:
            return  # It keeps its error for whoever gives it work, who knows better what it means (TensorBoard's).
        if hook.exc_value is not None and not issubclass(hook.exc_type, SystemExit):
            end(hook.exc_type, hook.exc_value, hook.exc_traceback)

    sys.excepthook = end
    threading.excepthook = end_from_thread
