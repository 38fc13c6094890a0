"""One point that doctor looked at, how it is printed, and what all of them together mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Breaks = Literal["all", "parallel", "horovod", "nothing"]


@dataclass(frozen=True)
class Finding:
    """One point. `breaks`: which training cannot work because of it; `remedy` is empty where all is well."""

    topic: str
    text: str
    remedy: str = ""
    breaks: Breaks = "nothing"

    @property
    def mark(self) -> str:
        """The word that its line starts with: ok, note (something to know) or FAIL."""
        if self.breaks != "nothing":
            return "FAIL"
        return "note" if self.remedy else "ok"

    def __str__(self) -> str:
        """The line that is printed, with the remedy on a second one."""
        first = f"{self.mark:<5} {self.topic:<16} {self.text}"
        return f"{first}\n{'':<23}-> {self.remedy}" if self.remedy else first


def verdict(findings: Sequence[Finding]) -> tuple[str, int]:
    """The closing sentence, and the exit status: 0 if training works alone and in parallel, else 1."""
    broken = {finding.breaks for finding in findings}
    mend = "mend the points marked FAIL, the first ones first."
    if "all" in broken:
        return f"Training does not work here: {mend}", 1
    if "parallel" in broken:
        return f"Only `hvdvae train --strategy local`, in one process, works here: {mend}", 1
    if "horovod" in broken:
        return f"Without Horovod, only --strategy local, or mpirun with --engine mpi, works here: {mend}", 1
    return "Training works here, in one process and in parallel.", 0
