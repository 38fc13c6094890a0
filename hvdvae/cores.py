"""How many threads a rank may use without taking another's cores."""

import os
from collections.abc import Sequence
from pathlib import Path

from hvdvae.world import World

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> set[int]:
    """Cores that this process may run on, by affinity (mpirun --bind-to, Slurm, taskset)."""
    if hasattr(os, "sched_getaffinity"):  # macOS has no affinity
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cgroup_cores() -> float:
    """CPU seconds a second that the control group grants; infinite where it sets no limit."""
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def threads_of_rank(world: World) -> int:
    """Threads for this rank: its cores, divided among the ranks of its host that share them. At least 1.

    OMP_NUM_THREADS, where the user has set it, rules. Blocks; every rank must call it.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if world.joins and not asked.isdecimal():
        return 1  # It cannot ask how many share its host.
    everyone = world.gather_objects([world.host, sorted(available_cores())], "gather of cores")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return fair_threads(world.rank, [(host, set(cores)) for host, cores in everyone], cgroup_cores())


def fair_threads(rank: int, everyone: Sequence[tuple[str, set[int]]], quota: float) -> int:
    """`everyone`: host and cores of each rank; `quota`: cores granted to the host's ranks together. Pure."""
    host, cores = everyone[rank]
    neighbours = [others for other, others in everyone if other == host]
    sharing = sum(1 for others in neighbours if cores & others)
    return max(1, int(min(len(cores) / sharing, quota / len(neighbours))))
