"""Whether other processes took part of the machine while something was measured."""

import time

import psutil  # type: ignore[import-untyped]

from benchmarks.crew import Crew


class Neighbours:
    """Processor time that processes other than the crew's use on this host, since it was made."""

    def __init__(self, crew: Crew) -> None:
        """Start now. Local."""
        self._crew = crew
        self._start = (time.perf_counter(), _host_seconds(), time.process_time())

    def cores(self) -> float:
        """Mean number of cores that they kept busy. Blocks; every rank must call it."""
        start, host, own = self._start
        ours: float = sum(self._crew.gather(time.process_time() - own))
        elapsed = time.perf_counter() - start
        return max(0.0, (_host_seconds() - host - ours) / elapsed)


def _host_seconds() -> float:
    """Processor seconds of all processes, idle and stolen time not counted; in steps of about 10 ms."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq")
    return float(sum(getattr(times, kind, 0.0) for kind in kinds))
