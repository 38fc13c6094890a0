"""Hosts that are not there: network namespaces with a name, an address and a shaped link each, on one machine.

    host 1 (10.77.0.1) --- link of so many Mbit/s ---+
    host 2 (10.77.0.2) --- link of so many Mbit/s ---+--- bridge
    ...                                              |

What a host sends is shaped by a token bucket (tc tbf) at its own end. Needs root, ip, tc and unshare.
"""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvdvae.cli import mpirun
from hvdvae.regular_file import open_in_place

PREFIX, SUBNET = "hvdvae", "10.77.0"
BURST, LATENCY = "64kb", "200ms"
"""Of the token bucket: what may leave at once, and how long a packet may queue."""


LOCK = Path(tempfile.gettempdir()) / "hvdvae-hosts.lock"


class NoNetwork(Exception):
    """Hosts cannot be made here; the text says why."""


@dataclass(frozen=True)
class Network:
    """So many hosts."""

    addresses: list[str]
    agent: Path
    """Starts a command on a host, as ssh would: AGENT ADDRESS WORDS..., which the shell there reads."""

    def mpirun(
        self,
        program: str,
        command: Sequence[str],
        *,
        each: int = 1,
        ranks: int = 0,
        fault_tolerant: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> list[str]:
        """A launch of `each` ranks a host, from the first host (Open MPI 4 and 5). `ranks`: in all, if fewer.

        `variables`: what the program needs in its environment, to say its version here.
        """
        net = f"{SUBNET}.0/24"
        shared, daemons, agent = "sm", ["--prtemca", "prte_if_include", net], ["--prtemca", "plm_ssh_agent"]
        if re.match(r"Open MPI [1-4]\.", mpirun.name(program, variables)):
            shared, daemons, agent = "vader", ["--mca", "oob_tcp_if_include", net], ["--mca", "plm_rsh_agent"]
        launcher = [program, *(["--with-ft", "ulfm"] if fault_tolerant else [])]
        launcher += ["--host", ",".join(f"{address}:{each}" for address in self.addresses)]
        launcher += [
            "-np",
            str(ranks or each * len(self.addresses)),
            "--bind-to",
            "none",
            "--prefix",
            str(Path(program).parents[1]),
        ]
        launcher += ["--mca", "pml", "ob1", "--mca", "btl", f"self,{shared},tcp", "--mca", "btl_tcp_if_include", net]
        launcher += [*daemons, *agent, str(self.agent)]
        return [str(self.agent), self.addresses[0], shlex.join([*launcher, *command])]


@contextmanager
def network(count: int, mbit: float) -> Iterator[Network]:
    """Inside, there are so many hosts, each on a link of `mbit` Mbit/s. Raises NoNetwork.

    Blocks while another process has its hosts, which have the same names.
    """
    if os.geteuid() != 0:
        raise NoNetwork("network namespaces need root")
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            raise NoNetwork(f"network namespaces need {program}, which is not on the path")
    with open_in_place(LOCK) as lock, tempfile.TemporaryDirectory(prefix="hvdvae-hosts-") as place:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _remove(count)
        agent = Path(place) / "agent"
        agent.write_text(AGENT)
        agent.chmod(0o700)
        try:
            _run(f"ip link add {PREFIX} type bridge")
            _run(f"ip link set {PREFIX} up")
            for number in range(1, count + 1):
                _add_host(number, mbit)
            yield Network([f"{SUBNET}.{number}" for number in range(1, count + 1)], agent)
        finally:
            _remove(count)


AGENT = f"""#!/bin/sh
# Runs a command on the host with this address: in its network namespace, under its name.
number=${{1##*.}}
shift
export HVDVAE_HOST={PREFIX}$number
exec ip netns exec $HVDVAE_HOST unshare --uts sh -c "hostname $HVDVAE_HOST && $*"
"""


def _add_host(number: int, mbit: float) -> None:
    host, outer = f"{PREFIX}{number}", f"{PREFIX}-v{number}"
    inside = f"ip netns exec {host}"
    _run(f"ip netns add {host}")
    _run(f"ip link add {outer} type veth peer name eth0 netns {host}")
    _run(f"ip link set {outer} master {PREFIX} up")
    _run(f"{inside} ip addr add {SUBNET}.{number}/24 dev eth0")
    _run(f"{inside} ip link set lo up")
    _run(f"{inside} ip link set eth0 up")
    _run(f"{inside} tc qdisc replace dev eth0 root tbf rate {mbit:g}mbit burst {BURST} latency {LATENCY}")


def _remove(count: int) -> None:
    """What there is of these hosts, also of a harness that was killed."""
    for number in range(1, count + 1):
        for command in (f"ip netns del {PREFIX}{number}", f"ip link del {PREFIX}-v{number}"):
            subprocess.run(shlex.split(command), capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", PREFIX], capture_output=True, check=False)


def _run(command: str | Sequence[str]) -> None:
    words = shlex.split(command) if isinstance(command, str) else list(command)
    try:
        ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoNetwork(f"{' '.join(words)}: {error}") from None
    if ended.returncode != 0:
        raise NoNetwork(f"{' '.join(words)}: {ended.stderr.strip() or ended.returncode}")
