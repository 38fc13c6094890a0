"""Which cores are a rank's, and how many threads it may use without taking another's."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hvdvae.world import World

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CORES = Path("/sys/devices/system/cpu")


def available_cores() -> set[int]:
    """Cores that this process may run on, by affinity (mpirun --bind-to, Slurm, taskset)."""
    if hasattr(os, "sched_getaffinity"):  # macOS has no affinity
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def granted_cores(environ: Mapping[str, str]) -> float:
    """CPU seconds a second that this process's control group, those around it, and Slurm grant its host's ranks.

    Infinite without a limit. Slurm's number counts where no affinity holds a job to its cores (TaskPlugin=task/none).
    """
    slurm = environ.get("SLURM_CPUS_ON_NODE", "")
    return min(_cgroup_cores(), int(slurm) if slurm.isdecimal() and int(slurm) > 0 else float("inf"))


def _cgroup_cores() -> float:
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        lines = []
    found = [_levels(_CGROUPS, line.removeprefix("0::"), _quota) for line in lines if line.startswith("0::")]
    # Version 1 has a tree for each controller.
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "cpu" in controllers.split(","):
            found.append(_levels(_CGROUPS / "cpu", group, _quota_of_version_1))
    return min(found or [_quota(_CGROUPS)])


def _levels(root: Path, group: str, quota: Callable[[Path], float]) -> float:
    """Slurm and containers nest groups: each level may set a limit."""
    return min(quota(root / str(level).lstrip("/")) for level in (Path(group), *Path(group).parents))


def _quota(group: Path) -> float:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def _quota_of_version_1(group: Path) -> float:
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else float("inf")
    except (OSError, ValueError):
        return float("inf")


def threads_of_rank(world: World) -> int:
    """Threads for this rank: its cores, divided among the ranks of its host that share them. At least 1.

    Where a launcher has left all cores of a host to all of its ranks, this one keeps to its own from now on
    (`own_cores`). OMP_NUM_THREADS, where the user has set it, rules. Blocks; every rank, servers too, must call it.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if world.joins:  # It cannot ask how many share its host.
        return int(asked) if asked.isdecimal() and int(asked) > 0 else 1
    mine = [world.host, sorted(available_cores()), world.role == "server"]
    everyone = (
        world.gather_from_everyone(mine, "gather of cores") if world.servers else world.gather_objects(mine, "cores")
    )
    rank = world.everyone.rank if world.servers else world.rank
    seats = [Seat(host, set(cores), serves) for host, cores, serves in everyone]
    own = own_cores(rank, seats, in_neighbourhood(seats[rank].cores))
    if own and hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # Where a rank may not choose, it computes as well where it is put.
            os.sched_setaffinity(0, own)
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return fair_threads(rank, seats, granted_cores(os.environ))


class Seat(NamedTuple):
    """Of one rank."""

    host: str
    cores: set[int]
    """That it may run on."""
    serves: bool = False
    """Whether it is a parameter server, which has one thread."""


def fair_threads(rank: int, everyone: Sequence[Seat], quota: float) -> int:
    """Of a rank among `everyone`; `quota`: cores granted to its host's ranks together. Pure."""
    mine = everyone[rank]
    if mine.serves:
        return 1
    neighbours = [seat for seat in everyone if seat.host == mine.host]
    sharing = [seat for seat in neighbours if seat.cores & mine.cores]
    by_affinity = _share(len(mine.cores), sharing)
    return max(1, int(min(by_affinity, _share(quota, neighbours))))


def own_cores(rank: int, everyone: Sequence[Seat], ordered: Sequence[int]) -> set[int]:
    """Those of `ordered` that a rank among `everyone` should keep to, by its place on its host; empty: all. Pure.

    Ranks that train share what servers leave equally, two each at least: with one each, threads that wait for messages
    would take it from those that compute. Where a launcher has given ranks different cores, it has placed them.
    """
    mine = everyone[rank]
    neighbours = [seat for seat in everyone if seat.host == mine.host]
    if mine.serves or len(neighbours) < 2 or any(seat.cores != mine.cores for seat in neighbours):
        return set()
    each = int(_share(len(ordered), neighbours))
    if each < 2:
        return set()
    place = sum(seat.host == mine.host and not seat.serves for seat in everyone[:rank])
    return set(ordered[place * each : (place + 1) * each])


def in_neighbourhood(cores: set[int]) -> list[int]:
    """By socket and physical core, so that neighbours share caches and memory."""
    return sorted(cores, key=lambda core: (*(_topology(core, of) for of in ("physical_package_id", "core_id")), core))


def _topology(core: int, of: str) -> int:
    try:
        return int((_CORES / f"cpu{core}" / "topology" / of).read_text())
    except (OSError, ValueError):
        return 0


def _share(cores: float, seats: Sequence[Seat]) -> float:
    """What is left of so many cores for each that trains, once servers have one each."""
    serving = sum(seat.serves for seat in seats)
    return (cores - serving) / (len(seats) - serving)
