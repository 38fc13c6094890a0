"""How long two hosts on a slow link take to give each other a vector, as Open MPI does it and as our World sets it.

    python benchmarks/slow_link.py
    python benchmarks/slow_link.py --mbit 1000 --megabytes 13 --rounds 5

Hosts are network namespaces, so this needs root. Both sides take turns; each turn is a job of its own, since MPI reads
its settings when it starts. Prints milliseconds an exchange (all of a turn's, divided by their number; median of turns
with the least and greatest), what the link alone takes, and how many times sooner our setting is.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.statistics_of_rounds import Spread, paired_ratios, spread
from benchmarks.study.launch import SETTINGS
from benchmarks.study.namespaces import NoNetwork, network
from hvdvae.cli import mpirun

KEY = "OMPI_MCA_btl_tcp_flags"
DEFAULT = "send,put,inplace,need-ack,need-csum,hetero-rdma"
"""Of Open MPI 5 (`ompi_info --param btl tcp --level 9`)."""
SIDES = {"as Open MPI does it": DEFAULT, "as our World sets it": SETTINGS[KEY]}
EXCHANGES = 25
"""Of a turn."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=100, help="of the link, each way [100]")
    parser.add_argument("--megabytes", type=float, default=0.655, help="of the vector [0.655]")
    parser.add_argument("--rounds", type=int, default=5, help="[5]")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    nbytes = round(asked.megabytes * 1e6)
    if asked.rank:
        exchange(nbytes)
        return
    ideal = nbytes * 8 / asked.mbit / 1e3
    print(f"{asked.megabytes} MB both ways at {asked.mbit:g} Mbit/s, {asked.rounds} rounds; the link: {ideal:.1f} ms")
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(asked.rounds):
        for name, flags in SIDES.items():
            turns[name].append(turn(asked.mbit, asked.megabytes, flags))
    for what in ("allgather", "allreduce"):
        seconds = {name: [one[what] for one in found] for name, found in turns.items()}
        for name, found in seconds.items():
            print(f"{what:<10} {name:<22} {_shown(spread(found), 1e3)} ms")
        print(f"{what:<10} {'times sooner':<22} {_shown(spread(paired_ratios(*seconds.values())), 1)}")


def turn(mbit: float, megabytes: float, flags: str) -> dict[str, float]:
    """Seconds an exchange, by its name, in a job with these flags. Blocks."""
    program = mpirun.find()
    if program is None:
        raise SystemExit("no mpirun in this Python's environment nor on the PATH: `hvdvae doctor` says more")
    environment = {**mpirun.environment(os.environ), **SETTINGS, KEY: flags}
    passed = [part for name in SETTINGS for part in ("-x", name)]
    job = [sys.executable, str(Path(__file__).resolve()), "--rank", "--megabytes", str(megabytes)]
    try:
        with network(2, mbit) as hosts:
            command = hosts.mpirun(program, [*passed, *job])
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    except NoNetwork as why:
        raise SystemExit(f"no hosts on a slow link can be made here: {why}") from None
    if ended.returncode != 0:
        raise SystemExit(f"a turn ended with status {ended.returncode}:\n{ended.stderr}")
    found: dict[str, float] = json.loads(ended.stdout)
    return found


def exchange(nbytes: int) -> None:
    """On a rank: both collectives, one call after the other as training steps make them. Rank 0 prints."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    mine, sums = np.ones(nbytes, np.uint8), np.zeros(nbytes // 4, np.float32)
    everyone = np.empty((comm.size, nbytes), np.uint8)
    found = {}
    for name, work in {
        "allgather": lambda: comm.Allgather(mine, everyone),
        "allreduce": lambda: comm.Allreduce(MPI.IN_PLACE, sums),
    }.items():
        for _ in range(3):
            work()
        begin = time.perf_counter()
        for _ in range(EXCHANGES):
            work()
        comm.Barrier()
        found[name] = (time.perf_counter() - begin) / EXCHANGES
    if comm.rank == 0:
        print(json.dumps(found))


def _shown(found: Spread | None, scale: float) -> str:
    assert found is not None
    return f"{found.median * scale:.2f} [{found.low * scale:.2f}, {found.high * scale:.2f}]"


if __name__ == "__main__":
    main()
