"""How to start ranks on this machine, for doctor's own short launches."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_OUTER = re.compile(r"(OMPI_COMM_|PMIX_|PMI_|PRTE_|SLURM_|HOROVOD_)")
_KEPT = re.compile(r"(PMIX_MCA_|PMIX_PREFIX$|PRTE_MCA_|PRTE_PREFIX$)")


def find() -> str | None:
    """Path of the mpirun of this Python's environment, else of the first on PATH, else None."""
    own = Path(sys.executable).parent / "mpirun"
    return str(own) if own.exists() else shutil.which("mpirun")


def of_library(library: str) -> tuple[str | None, str]:
    """The mpirun of an MPI library, whose name is as `parse_name` says it, and its own name; else what `find` finds.

    An environment may bring an mpirun while a module of the site has put another library in front of its own.
    """
    path = find()
    maker = name(path) if path else ""
    on_path = shutil.which("mpirun")
    if on_path and on_path != path and maker != library and name(on_path) == library:
        return on_path, library
    return path, maker


def name(mpirun: str, variables: Mapping[str, str] | None = None) -> str:
    """Maker and version, as `Open MPI 5.0.11`; else what it says of itself first. Blocks for up to 20 s.

    `variables`: of its environment, beside this process's.
    """
    inner = environment(os.environ) | dict(variables or {})
    try:
        run = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=20, env=inner)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({mpirun} --version: {error})"
    return parse_name(run.stdout + run.stderr)


def parse_name(said: str) -> str:
    """The name and version in what `mpirun --version` or MPI_Get_library_version says. Pure."""
    for pattern, maker in (
        # Version 4 calls itself OpenRTE under any other name than mpirun, as Debian's mpirun.openmpi is.
        (r"\(?Open ?(?:MPI|RTE)\)? v?(\d[\w.]*)", "Open MPI"),
        (r"HYDRA[\s\S]*?Version:\s*(\d[\w.]*)", "MPICH"),
        (r"MPICH Version:\s*(\d[\w.]*)", "MPICH"),
        (r"Intel\(R\) MPI Library\D*?(\d[\w.]*)", "Intel MPI"),
    ):
        found = re.search(pattern, said)
        if found:
            return f"{maker} {found[1]}"
    return said.strip().split("\n")[0]


def command(mpirun: str, maker: str, ranks: int, *, fault_tolerant: bool = False) -> list[str]:
    """An mpirun of `ranks` ranks here, even with fewer cores. `maker`: as `name` says it. Pure."""
    parts = [mpirun]
    if fault_tolerant:
        parts += ["--with-ft", "ulfm"]
    parts += ["-np", str(ranks)]
    if re.match(r"Open MPI [1-4]\.", maker):
        return [*parts, "--oversubscribe", "--bind-to", "none"]
    if maker.startswith("Open MPI"):
        return [*parts, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    if maker.startswith("MPICH"):
        return [*parts, "-bind-to", "none"]
    return parts


def environment(outer: Mapping[str, str]) -> dict[str, str]:
    """`outer` without what an mpirun or srun around this process set, which would mislead one inside.

    Open MPI's settings by the site stay, unless an Open MPI launch is around: its own are then among them.
    """
    inside = "OMPI_COMM_WORLD_SIZE" in outer
    inner = {
        key: value
        for key, value in outer.items()
        if not (_OUTER.match(key) and not _KEPT.match(key)) and not (inside and key.startswith("OMPI_"))
    }
    if os.getuid() == 0:
        inner |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    inner["OMP_NUM_THREADS"] = "1"
    return inner
