"""Where every rank runs, as a table at the start of a run, and what is wrong with it."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from hvdvae.cli.results import versions
from hvdvae.cores import available_cores, granted_cores
from hvdvae.errors import WorldError
from hvdvae.launcher import Launch
from hvdvae.world import World
from hvdvae.world.probe import probe_hosts, slow_pairs

SAME_EVERYWHERE = ("hvdvae", "torch", "horovod", "mpi4py", "MPI")
"""Whose versions may not differ: ranks would compute or speak differently."""


class Place(NamedTuple):
    """One rank, JSON-able."""

    rank: int
    """Among all, those that train first."""
    host: str
    role: str
    device: str
    cores: list[int]
    quota: float | None
    """Cores that control groups and Slurm grant to the host's ranks together; None: no limit."""
    threads: int
    versions: dict[str, str]
    gpu: str = ""
    """Which one it is, whatever it is called in this process."""


def placement(world: World, threads: int) -> list[Place]:
    """All ranks, by rank, on all ranks. Blocks; every rank, servers too, must call it."""
    if world.everyone is not None:
        from hvdvae.world.mpi import library_version
    quota = granted_cores(os.environ)
    mine = Place(
        world.everyone.rank if world.servers else world.rank,
        world.host,
        "trains" if world.role == "trainer" else "serves",
        str(world.device),
        sorted(available_cores()),
        None if quota == float("inf") else quota,
        threads if world.role == "trainer" else 1,
        versions() | ({"MPI": library_version()} if world.everyone is not None else {}),
        str(torch.cuda.get_device_properties(world.device).uuid) if world.device.type == "cuda" else "",
    )
    everyone = (
        world.gather_from_everyone(mine, "gather of places") if world.servers else world.gather_objects(mine, "places")
    )
    return [Place(*found) for found in everyone]


def check_versions(places: Sequence[Place]) -> None:
    """Raises WorldError, on all ranks, where hosts have different libraries. Pure."""
    first = places[0]
    for place in places:
        for name in SAME_EVERYWHERE:
            theirs, ours = place.versions.get(name), first.versions.get(name)
            if theirs != ours:
                raise WorldError(
                    f"{name} is {theirs} on rank {place.rank} ({place.host}) and {ours} on rank {first.rank} "
                    f"({first.host}), expected the same on all hosts: install the same there, or activate the same "
                    "environment"
                )


def check_slurm(environ: Mapping[str, str], launch: Launch, strategy: str | None) -> str:
    """Whether as many ranks run as the Slurm job has tasks; what to warn of. Pure. `strategy`: None in evaluation.

    Raises WorldError for one process of a job of several tasks or hosts that was to work in parallel: its launcher is
    missing, or speaks another PMI than this MPI, so that each task is a job of its own.
    """
    tasks, hosts = (environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
    if tasks.isdecimal() and int(tasks) != launch.size:
        if launch.size == 1 and strategy != "local":
            raise _started_alone(f"{tasks} tasks (SLURM_NTASKS)", strategy)
        if launch.size > int(tasks):
            return (
                f"{launch.size} ranks in a Slurm job of {tasks} tasks (SLURM_NTASKS): more than it has cores for; ask "
                "for as many tasks as ranks"
            )
        return f"{launch.size} ranks of the {tasks} tasks that the Slurm job has (SLURM_NTASKS): the others idle"
    # Slurm counts no tasks where nobody asked for some. One rank of a launcher is as many as it was told to start.
    if launch.launcher == "none" and hosts.isdecimal() and int(hosts) > 1 and strategy != "local":
        raise _started_alone(f"{hosts} hosts (SLURM_JOB_NUM_NODES)", strategy)
    return ""


def _started_alone(job: str, strategy: str | None) -> WorldError:
    alone = (
        "evaluate in one process with `srun -N1 -n1`"
        if strategy is None
        else "train in one process with --strategy local"
    )
    return WorldError(
        f"this Slurm job has {job}, but this process was started alone: start it with `srun --mpi=pmix hvdvae ...` or "
        f"`mpirun hvdvae ...`, or {alone}"
    )


def check_hosts(environ: Mapping[str, str], launch: Launch, places: Sequence[Place]) -> None:
    """Raises WorldError, on all ranks, where all tasks of a Slurm job run on some of its hosts. Pure.

    So does an mpirun that was built without Slurm. Fewer ranks than tasks may have been asked for (`absent_hosts`), and
    srun knows the hosts of its step.
    """
    granted, tasks = (environ.get(name, "") for name in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"))
    used = sorted({place.host for place in places})
    if launch.launcher == "srun" or tasks != str(len(places)) or not granted.isdecimal():
        return
    if len(used) < min(int(granted), len(places)):
        raise WorldError(
            f"all {tasks} ranks run on {', '.join(used)}, but the Slurm job has {granted} hosts (SLURM_JOB_NUM_NODES): "
            f"its {launch.launcher} does not know them; name them (--host, -H), or use `srun --mpi=pmix`. Where this "
            "is as it should be, unset SLURM_JOB_NUM_NODES"
        )


def absent_hosts(environ: Mapping[str, str], places: Sequence[Place]) -> str:
    """A warning where a Slurm job has hosts on which no rank runs. Pure."""
    granted, used = environ.get("SLURM_JOB_NUM_NODES", ""), len({place.host for place in places})
    if not granted.isdecimal() or int(granted) <= used:
        return ""
    return f"ranks run on {used} of the {granted} hosts that the Slurm job has (SLURM_JOB_NUM_NODES)"


def table(places: Sequence[Place]) -> str:
    """One line for ranks of the same host and role that are alike. Pure."""
    rows = [("host", "ranks", "role", "device", "cores", "threads a rank")]
    ordered = sorted(places, key=lambda place: (place.host, place.role == "serves", place.rank))
    for (host, role, threads), group in groupby(ordered, key=lambda place: (place.host, place.role, place.threads)):
        alike = list(group)
        cores = set[int]().union(*(place.cores for place in alike))
        devices = sorted({place.device for place in alike})
        rows.append((host, _spans([p.rank for p in alike]), role, ", ".join(devices), f"{len(cores)}", f"{threads}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def crowded(places: Sequence[Place]) -> list[str]:
    """A warning for each host whose ranks share a GPU, or have more threads than it has cores for them. Pure."""
    warnings = []
    for host in dict.fromkeys(place.host for place in places):
        here = [place for place in places if place.host == host]
        for gpu, together in Counter(place.gpu for place in here if place.gpu).items():
            if together > 1:
                warnings.append(
                    f"{host}: {together} ranks share the GPU {gpu}: start as many ranks there as it has GPUs, or give "
                    "--device"
                )
        cores = min(len(set[int]().union(*(place.cores for place in here))), here[0].quota or float("inf"))
        threads = sum(place.threads for place in here)
        if threads > max(cores, 1):  # One thread is the least.
            ranks = "1 rank" if len(here) == 1 else f"{len(here)} ranks"
            fewer = "Lower --threads (OMP_NUM_THREADS)" if threads > len(here) else "Start fewer ranks there"
            warnings.append(
                f"{host} has {cores:g} cores for {threads} threads of {ranks}: they will wait for each other. {fewer}, "
                "or ask for more cores"
            )
    return warnings


def announce(world: World, strategy: str, launch: Launch, threads: int) -> None:
    """Check hosts and their libraries, print a table of several ranks, and warn of crowded hosts and slow links.

    Blocks; every rank, servers too, must call it. Raises WorldError.
    """
    places = placement(world, threads)
    check_versions(places)
    check_hosts(os.environ, launch, places)
    slow = slow_pairs(probe_hosts(world))
    if world.is_first:
        idle = [check_slurm(os.environ, launch, strategy), absent_hosts(os.environ, places)]
        warnings = [f"hvdvae: warning: {text}" for text in (*idle, *crowded(places), *slow) if text]
        for line in [*([table(places)] if len(places) > 1 else []), *warnings]:
            print(line, flush=True)


def _spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in spans)
