"""Ranks on several hosts: network namespaces with a name, an address and a link each."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks.study.namespaces import PREFIX, Network, NoNetwork, network
from tests.system.conftest import Launch
from tests.system.open_mpi import OpenMpi, four, own
from tests.system.worker_jobs import await_first_epoch, has_ulfm

FAST_MBIT = 5000.0
TWO, THREE = (2, FAST_MBIT, None), (3, FAST_MBIT, None)
TWO_BY_4, THREE_BY_4 = (pytest.param((count, FAST_MBIT, 4), id=f"{count} hosts, Open MPI 4") for count in (2, 3))
"""How many hosts, on links of how many Mbit/s, with which Open MPI: None is the environment's own."""
SHORT = "--data digits --batch-size 10 --nll-samples 2 --pictures-every 0 --threads 1 --deadline 30 --out run"


class Hosts:
    """So many hosts, and jobs on them that are ended with them."""

    def __init__(self, made: Network, folder: Path, mpi: OpenMpi) -> None:
        self.made, self.folder, self.mpi = made, folder, mpi
        self.jobs: list[Launch] = []

    def train(self, options: str, *, each: int = 1, fault_tolerant: bool = False, supervise: str = "") -> Launch:
        """`hvdvae train` on `each` ranks a host, started from the first host."""
        if fault_tolerant and not has_ulfm():
            pytest.skip("this MPI has no ULFM")
        command = [sys.executable, "-m", "hvdvae", "train", *SHORT.split(), *options.split()]
        passed = [word for name in ("PYTHONPATH", "OMP_NUM_THREADS") for word in ("-x", name)]
        words = self.made.mpirun(
            self.mpi.program,
            [*passed, *command],
            each=each,
            fault_tolerant=fault_tolerant,
            variables=self.mpi.variables,
        )
        if supervise:
            # The command is one word, a line for the shell of the first host: what follows is added to it.
            words = [sys.executable, "-m", "hvdvae", "supervise", *supervise.split(), "--", *words, "--out", "run"]
        self.jobs.append(Launch(words, self.mpi.environment(), self.folder))
        return self.jobs[-1]

    def of(self, host: int) -> list[psutil.Process]:
        """The processes that run on a host."""
        said = subprocess.run(["ip", "netns", "pids", f"{PREFIX}{host}"], capture_output=True, text=True, check=True)
        return [psutil.Process(int(number)) for number in said.stdout.split() if psutil.pid_exists(int(number))]

    def rank_on(self, host: int) -> psutil.Process:
        """A process that trains there."""
        return next(process for process in self.of(host) if "OMPI_COMM_WORLD_RANK" in process.environ())

    def summary(self) -> dict[str, object]:
        """Of the run."""
        found: dict[str, object] = json.loads((self.folder / "run" / "summary.json").read_text())
        return found


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hosts]:
    count, mbit, version = getattr(request, "param", TWO)
    mpi = four() if version == 4 else own()
    try:
        with network(count, mbit) as made:
            found = Hosts(made, tmp_path, mpi)
            yield found
            for job in found.jobs:
                job.kill()
            for number in range(1, count + 1):
                for process in found.of(number):
                    process.kill()
    except NoNetwork as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
@pytest.mark.parametrize("hosts", [TWO, THREE, TWO_BY_4], indirect=True)
def test_training_in_step(hosts: Hosts, engine: str) -> None:
    ended = hosts.train(f"--epochs 2 --engine {engine}").finish(120)
    assert ended.status == 0, ended.output
    for rank in range(len(hosts.made.addresses)):
        assert re.search(rf"{PREFIX}{rank + 1} +{rank} +trains", ended.output)
    assert hosts.summary()["world_size"] == len(hosts.made.addresses)


def test_servers_are_on_all_hosts(hosts: Hosts) -> None:
    ended = hosts.train("--epochs 2 --strategy ps --servers 2", each=2).finish(120)
    assert ended.status == 0, ended.output
    for line in (f"{PREFIX}1  0      trains", f"{PREFIX}1  3      serves", f"{PREFIX}2  1      trains"):
        assert line in ended.output
    assert f"{PREFIX}2  2      serves" in ended.output
    assert hosts.summary()["servers"] == 2


@pytest.mark.parametrize("hosts", [THREE_BY_4], indirect=True)
def test_a_server_for_workers_on_other_hosts(hosts: Hosts) -> None:
    ended = hosts.train("--epochs 2 --strategy ps").finish(120)
    assert ended.status == 0, ended.output
    assert re.search(rf"{PREFIX}3 +2 +serves", ended.output)
    assert hosts.summary()["servers"] == 1


@pytest.mark.parametrize("hosts", [(2, 50.0, None)], indirect=True)
def test_a_slow_link_is_named_at_the_start(hosts: Hosts) -> None:
    ended = hosts.train("--epochs 1 --compression int8").finish(120)
    assert ended.status == 0, ended.output
    found = re.search(rf"warning: {PREFIX}1 and {PREFIX}2 reach each other slowly: (\d+) Mbit/s", ended.output)
    assert found
    assert 20 < int(found[1]) < 100


@pytest.mark.parametrize("plan", ["--engine mpi", "--engine horovod", "--strategy ps"])
def test_a_rank_that_dies_on_another_host(hosts: Hosts, plan: str) -> None:
    each = 2 if "ps" in plan else 1
    job = hosts.train(f"--epochs 8 {plan}", each=each, fault_tolerant=True)
    await_first_epoch(hosts.folder)
    # With servers, the second host's ranks are a worker and the server.
    victims = [p for p in hosts.of(2) if p.environ().get("OMPI_COMM_WORLD_RANK") == str(each)]
    victims[0].kill()
    ended = job.finish(120)
    assert ended.status == 0, ended.output
    assert "has died" in ended.output
    assert hosts.summary()["epochs"] == 8


@pytest.mark.parametrize("plan", ["--engine mpi", "--engine horovod", "--strategy ps"])
@pytest.mark.parametrize("hosts", [TWO_BY_4], indirect=True)
def test_a_rank_that_dies_on_another_host_ends_a_job_that_cannot_go_on(hosts: Hosts, plan: str) -> None:
    job = hosts.train(f"--epochs 200 {plan}", each=2 if "ps" in plan else 1)
    await_first_epoch(hosts.folder)
    victim = hosts.rank_on(2)
    rank = victim.environ()["OMPI_COMM_WORLD_RANK"]
    victim.kill()
    ended = job.finish(60)
    assert ended.status != 0, ended.output
    # It names the host as it was told to reach it.
    assert re.search(rf"rank {rank} .*({PREFIX}2|{re.escape(hosts.made.addresses[1])})", ended.output), ended.output


@pytest.mark.parametrize("plan", ["--engine mpi", "--strategy ps"])
@pytest.mark.parametrize("hosts", [TWO, TWO_BY_4], indirect=True)
def test_a_link_that_is_cut_for_ten_seconds(hosts: Hosts, plan: str) -> None:
    # TCP may try again half a minute after the link is back only: it waits ever longer between two tries.
    job = hosts.train(f"--epochs 15 --deadline 120 {plan}", each=2 if "ps" in plan else 1)
    await_first_epoch(hosts.folder)
    link = ["ip", "link", "set", f"{PREFIX}-v2"]
    subprocess.run([*link, "down"], check=True)
    time.sleep(10)
    assert job.process.poll() is None, "the job waits"
    subprocess.run([*link, "up"], check=True)
    ended = job.finish(200)
    assert ended.status == 0, ended.output
    assert hosts.summary()["epochs"] == 15


@pytest.mark.parametrize("hosts", [TWO, TWO_BY_4], indirect=True)
def test_a_host_that_vanishes_ends_the_job_and_a_supervisor_starts_it_again(hosts: Hosts) -> None:
    job = hosts.train("--epochs 12 --engine mpi --resume", supervise="--restarts 1 --backoff 1")
    while not list(hosts.folder.glob("run/checkpoints/step-*")):
        time.sleep(0.05)
    for process in hosts.of(2):
        process.kill()
    ended = job.finish(200)
    assert "restart 1 of 1" in ended.output
    assert ended.status == 0, ended.output
    assert "resumed at step" in ended.output
    assert hosts.summary()["epochs"] == 12
