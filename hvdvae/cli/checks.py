"""What doctor makes of the answers: from facts to one finding, with the remedy where one is needed. Pure."""

import sys
from collections.abc import Mapping

from hvdvae.cli import mpirun
from hvdvae.cli.finding import Breaks, Finding
from hvdvae.cli.probes import Answer
from hvdvae.launcher import detect

INSTALL = "run launch/install.sh"


def python() -> Finding:
    """Which Python runs this. It need not be checked: an older one could not have imported this."""
    return Finding("Python", f"{sys.version.split()[0]}, {sys.executable}")


def torch(answer: Answer) -> Finding:
    """Whether torch imports, and which build it is."""
    if answer.error:
        return Finding("torch", f"does not import: {answer.error}", INSTALL, "all")
    cuda = answer.facts["cuda"]
    return Finding("torch", f"{answer.facts['version']}, {f'CUDA {cuda}' if cuda else 'CPU build'}")


def gpu(answer: Answer, driver: bool, horovod: Answer) -> Finding:
    """Whether torch sees the GPUs that the driver sees, and Horovod has NCCL. `driver`: nvidia-smi works."""
    names = answer.facts.get("gpus", [])
    if not names and not driver:
        return Finding("GPU", "none")
    if not names:
        cuda = answer.facts.get("cuda")
        why = f"torch {answer.facts.get('version', '')} does not see it"
        remedy = "is the driver new enough for that CUDA?" if cuda else f"HVDVAE_TORCH=cuda, then {INSTALL}"
        return Finding("GPU", f"nvidia-smi answers, {why}", remedy)
    text = f"{len(names)} x {names[0]}"
    if not horovod.facts.get("nccl"):
        remedy = f"load a CUDA with nvcc (module load cuda), then {INSTALL}"
        return Finding("GPU", f"{text}; without NCCL, Horovod takes gradients through the host", remedy)
    return Finding("GPU", f"{text}, NCCL in Horovod")


def mpi(answer: Answer) -> Finding:
    """Whether mpi4py finds an MPI that starts."""
    if answer.error:
        remedy = f"load the module of the MPI it was built with, or {INSTALL}"
        return Finding("MPI", f"mpi4py does not start: {answer.error}", remedy, "parallel")
    facts = answer.facts
    maker = mpirun.parse_name(facts["library"])
    where = ", ".join(facts["libmpi"])
    return Finding("MPI", f"{maker} (MPI {facts['standard']}), mpi4py {facts['version']}, {where}")


def threads(answer: Answer) -> Finding:
    """MPI's thread level. For an MPI that starts."""
    level = answer.facts["threads"]
    if level != "MULTIPLE":
        remedy = "ask for an MPI built with MPI_THREAD_MULTIPLE if Horovod hangs; --engine mpi needs less"
        return Finding("threads", f"MPI_THREAD_{level}", remedy)
    return Finding("threads", "MPI_THREAD_MULTIPLE")


def launcher_program(path: str | None, on_path: str | None, maker: str, answer: Answer) -> Finding:
    """Whether mpirun is there and of the MPI that mpi4py uses. `on_path`: the mpirun that the shell finds."""
    if path is None:
        remedy = f"put the mpirun of your MPI on PATH (module load openmpi), or {INSTALL}"
        return Finding("mpirun", "not found", remedy, "parallel")
    text = f"{maker}, {path}"
    library = mpirun.parse_name(answer.facts.get("library", ""))
    if library and maker.split()[0] in ("Open", "MPICH") and maker != library:
        remedy = f"put the mpirun of {library} first on PATH, or {INSTALL} to build for this one"
        return Finding("mpirun", f"{text}, but mpi4py uses {library}", remedy, "parallel")
    if on_path != path:
        remedy = f"put {path.removesuffix('/mpirun')} first on PATH (source its activate script)"
        return Finding("mpirun", f"{text}, but PATH finds {on_path or 'none'}", remedy)
    return Finding("mpirun", text)


def ulfm(answer: Answer) -> Finding:
    """Whether survivors can go on after a rank dies."""
    if answer.error or answer.facts.get("size") != 2:
        remedy = "fine without; Open MPI 5 has it (mpirun --with-ft ulfm). A rank that dies ends the job"
        return Finding("ULFM", "not available", remedy)
    return Finding("ULFM", "available with mpirun --with-ft ulfm")


def horovod(answer: Answer) -> Finding:
    """Whether Horovod imports, and what it was built with."""
    if answer.error:
        remedy = f"{INSTALL}, which builds it for this MPI and torch"
        return Finding("Horovod", f"does not import: {answer.error}", remedy, "horovod")
    facts = answer.facts
    parts = ", ".join(f"{'with' if facts[key] else 'no'} {name}" for key, name in _HOROVOD_PARTS.items())
    text = f"{facts['version']}, {parts}"
    if not facts["mpi"]:
        remedy = f"under mpirun it needs MPI: {INSTALL} with mpicc on PATH"
        return Finding("Horovod", text, remedy, "horovod")
    return Finding("Horovod", text)


_HOROVOD_PARTS = {"mpi": "MPI", "gloo": "Gloo", "nccl": "NCCL"}


def built_for(answer: Answer, torch_answer: Answer, mpi_answer: Answer) -> Finding:
    """Whether Horovod was built for the torch and the MPI that are here. For a Horovod that imports."""
    topic = "Horovod for"
    then, now = answer.facts["torch"], torch_answer.facts.get("version")
    if then is not None and now is not None and then != now:
        return Finding(topic, f"torch {then}, but torch {now} is installed", INSTALL, "horovod")
    linked, used = answer.facts["libmpi"], mpi_answer.facts.get("libmpi", [])
    if linked and used and linked != used:
        text = f"{', '.join(linked)}, but mpi4py uses {', '.join(used)}"
        remedy = f"unset LD_LIBRARY_PATH or load one MPI only, then {INSTALL}"
        return Finding(topic, text, remedy, "horovod")
    same = ", the MPI that mpi4py uses" if linked and used else ""
    return Finding(topic, f"torch {then or now}{same}")


def launcher(environ: Mapping[str, str]) -> Finding:
    """What started this process. Raises WorldError on a launcher's variable that is not a number."""
    launch = detect(environ)
    if launch.launcher != "none":
        return Finding("launcher", f"{launch.launcher}, {launch.size} ranks, {launch.local_size} on this host")
    job = environ.get("SLURM_JOB_ID")
    return Finding("launcher", f"none, in Slurm job {job}" if job else "none (mpirun -np N starts ranks)")


def shared_memory(cleared: str) -> Finding:
    """What was done about shared memory that killed jobs have left (leftovers.py)."""
    return Finding("shared memory", cleared or "no segments of killed jobs")


def cores(available: int, quota: float, ranks: int) -> Finding:
    """Cores for each of `ranks` ranks of this host. `quota`: cores that are granted."""
    here = min(float(available), quota)
    text = f"{here:g} here, {here / ranks:g} a rank with {ranks} ranks"
    if here < ranks:
        remedy = "waiting ranks spin: start no more ranks than cores, or ask for more cores"
        return Finding("cores", text, remedy)
    return Finding("cores", text)


def pair(engine: str, answer: Answer) -> Finding:
    """Whether an allreduce of 1 and 2 over two ranks gave 3, with this engine."""
    topic = f"2 ranks, {engine}"
    breaks: Breaks = "parallel" if engine == "mpi" else "horovod"
    facts = answer.facts
    if answer.error:
        remedy = f"if the points above are well, {INSTALL} and try again on an idle machine"
        return Finding(topic, f"no allreduce: {answer.error}", remedy, breaks)
    if facts["size"] != 2:
        remedy = f"its MPI does not know this mpirun: {INSTALL} with that mpirun's mpicc first on PATH"
        return Finding(topic, f"mpirun -np 2 gave a world of size {facts['size']}", remedy, breaks)
    if facts["total"] != 3:
        remedy = "this MPI computes wrongly: use another"
        return Finding(topic, f"the allreduce of 1 and 2 gave {facts['total']:g}", remedy, breaks)
    return Finding(topic, "allreduce of 1 and 2 gave 3")
