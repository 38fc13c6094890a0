"""What became of a run that something happened to, and the table of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fault_run import Job
from hvdvae.checkpoint import Folder


@dataclass(frozen=True)
class Outcome:
    """Of one fault in one way."""

    fault: str
    way: str
    words: str
    seconds: float | None = None
    """From the fault, or its end where it lasts, to the first beat after it."""
    lost: int | None = None
    """Steps that had been told of, and were taken again, or that were skipped."""
    status: int | None = None
    broken: bool = False


def outcome(fault: str, way: str, job: Job) -> Outcome:
    """Wait for the end, and say what became of the run. Blocks."""
    status = job.end()
    if status is None:
        return Outcome(fault, way, "hangs", broken=True)
    good = Folder(job.out / "checkpoints", 3).newest_good() is not None
    if not (job.out / "summary.json").exists():
        broken = status == 0 or not good or not job.may_end
        return Outcome(fault, way, "ends, can be resumed" if good else "ends", None, None, status, broken)
    seconds, lost, restarted = _went_on(job)
    words = "started again" if restarted else "skips the step" if job.spent else "goes on"
    return Outcome(fault, way, words, seconds, lost, status, broken=status != 0 or not good)


def _went_on(job: Job) -> tuple[float | None, int | None, bool]:
    """Seconds, steps lost, and whether a supervisor has started it again; a job that was done already has lost none."""
    said = job.said()
    text = "\n".join(line for _, line in said)
    restarted_at = next((at for at, line in said if "restart 1 of" in line), None)
    went_on, resumed = (re.search(words, text) for words in (r"go on from step (\d+)", r"resumed at step (\d+)"))
    since = job.fault_at if restarted_at is None else restarted_at
    # A beat may have been agreed on before a rank was killed, and told after it.
    least = int(went_on[1]) if went_on else -1
    before = [job.step_before, *(step for at, step in job.beats() if at <= job.fault_at)]
    after = [(at, step) for at, step in job.beats() if at > since and step > least]
    if not after:
        return None, None, restarted_at is not None
    goes_on_from = next((int(found[1]) for found in (went_on, resumed) if found), 0 if restarted_at else after[0][1])
    lost = max(0, before[-1] - goes_on_from) + job.spent
    return after[0][0] - job.fault_at, lost, restarted_at is not None


def table(found: Sequence[Outcome]) -> str:
    """As Markdown. Pure."""
    head = "| fault | way of training | outcome | seconds to go on | steps lost | exit status |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(row, found)])


def row(one: Outcome) -> str:
    """Of the table. Pure."""
    seconds = "" if one.seconds is None else f"{one.seconds:.2f}"
    lost, status = ("" if value is None else str(value) for value in (one.lost, one.status))
    words = f"**broken**: {one.words}" if one.broken else one.words
    return f"| {one.fault} | {one.way} | {words} | {seconds} | {lost} | {status} |"
