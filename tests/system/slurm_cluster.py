"""A real Slurm of two hosts on this machine: network namespaces, a controller, and a daemon in each."""

import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.study.namespaces import PREFIX, SUBNET, NoNetwork, network
from tests.system.conftest import clean_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
CONTROLLER = f"{SUBNET}.254"
SLURM_MBIT = 10_000.0

CONF = """\
ClusterName=hvdvae
SlurmctldHost={name}({controller})
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,requeue_delay=0
KillWait=20
MinJobAge=600
JobRequeue=1
NodeName={prefix}[1-2] NodeAddr={subnet}.[1-2] CPUs=4 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"Slurm is not installed: {', '.join(absent)}"
    try:
        with network(1, SLURM_MBIT):
            return ""
    except NoNetwork as why:
        return str(why)


@dataclass(frozen=True)
class Cluster:
    """A running one."""

    folder: Path
    environment: dict[str, str]

    def run(self, command: str, *, check: bool = True) -> str:
        """What a command of Slurm prints, run on the controller's host."""
        ended = subprocess.run(
            shlex.split(command), env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0 or not check, f"{command}: {ended.stdout}{ended.stderr}"
        return ended.stdout + ended.stderr

    def submit(self, flags: str, script: Path, *words: object) -> str:
        """The number of a submitted job, whose output goes to job-NUMBER.txt."""
        said = self.run(
            f"sbatch --parsable --output={self.folder}/job-%A.txt {flags} {script} {shlex.join(map(str, words))}"
        )
        return said.strip().split(";")[0]

    def id(self, job: str) -> str:
        """The number that an element of an array (7_2) has as a job of its own."""
        return self.run(f"scontrol --oneliner show job {job}").split()[0].removeprefix("JobId=")

    def state(self, job: str) -> str:
        """As scontrol has it: PENDING, RUNNING, COMPLETED, FAILED, ..."""
        said = self.run(f"scontrol --oneliner show job {job}")
        states = [word.split("=")[1] for word in said.split() if word.startswith("JobState=")]
        return " ".join(states)

    def output(self, job: str) -> str:
        """What the job has said so far."""
        file = self.folder / f"job-{job}.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def await_output(self, job: str, text: str, seconds: float = 90, *, after: str = "") -> None:
        """Return once the job has said this, after the last time that it said `after`."""
        give_up = time.monotonic() + seconds
        while after not in (said := self.output(job)) or text not in said[said.rfind(after) if after else 0 :]:
            assert time.monotonic() < give_up, f"{self.state(job)}: {self.output(job)}{self.logs()}"
            time.sleep(0.1)

    def await_end(self, job: str, seconds: float = 150) -> str:
        """The state that a job ends in."""
        give_up = time.monotonic() + seconds
        while any(state in self.state(job) for state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")):
            assert time.monotonic() < give_up, f"{self.state(job)}: {self.output(job)}{self.logs()}"
            time.sleep(0.3)
        return self.state(job)

    def has_pmix(self) -> bool:
        """Whether srun can start ranks by --mpi=pmix."""
        return "pmix" in self.run("srun --mpi=list", check=False)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "".join(
            f"\n{file.name}:\n" + "\n".join(file.read_text(errors="replace").splitlines()[-25:])
            for file in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Inside, Slurm runs. `folder`: of its files, and where jobs start."""
    for name in ("state", *(f"{kind}-{PREFIX}{number}" for kind in ("spool", "tmp") for number in (1, 2))):
        (folder / name).mkdir()
    # munge wants its folders to be nobody else's.
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    name = os.uname().nodename
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, controller=CONTROLLER, name=name, prefix=PREFIX, subnet=SUBNET))
    # Gloo looks for an address by the host's name, which nobody here knows.
    environment = {**clean_environment(), "SLURM_CONF": str(conf), "PATH": _path(), "GLOO_SOCKET_IFNAME": "eth0"}
    daemons: list[subprocess.Popen[bytes]] = []

    def start(command: str) -> None:
        log = (folder / f"daemon-{len(daemons)}.log").open("wb")
        daemons.append(
            subprocess.Popen(shlex.split(command), env=environment, stdout=log, stderr=log, start_new_session=True)
        )

    with network(2, SLURM_MBIT):
        subprocess.run(["ip", "addr", "add", f"{CONTROLLER}/24", "dev", PREFIX], check=True)
        try:
            files = f"--key-file={key} --socket={folder}/munge.socket --pid-file={folder}/munged.pid"
            start(f"munged --foreground --force {files} --log-file={folder}/munged.log --seed-file={folder}/seed")
            _await(lambda: (folder / "munge.socket").exists(), "munged")
            start(f"slurmctld -D -f {conf}")
            for number in (1, 2):
                host = f"{PREFIX}{number}"
                inner = f"hostname {host} && exec slurmd -D -N {host} -f {conf}"
                # `ip netns exec` would hide the control groups.
                start(f"nsenter --net=/run/netns/{host} unshare --uts sh -c {shlex.quote(inner)}")
            made = Cluster(folder, environment)
            _await(lambda: made.run("sinfo -h -o %T", check=False).split() == ["idle"], "the hosts", made.logs)
            yield made
            made.run("scancel --user=root", check=False)
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in reversed(daemons):
                try:
                    daemon.wait(8)
                except subprocess.TimeoutExpired:
                    daemon.kill()


def _await(condition: object, what: str, logs: object = str) -> None:
    give_up = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up, f"{what} did not come up: {logs()}"  # type: ignore[operator]
        time.sleep(0.2)


def _path() -> str:
    """Daemons stand in /usr/sbin, which not every user's path has."""
    return os.pathsep.join([clean_environment()["PATH"], "/usr/sbin"])
