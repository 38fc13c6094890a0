"""The Open MPIs that tests launch with: the environment's own, and one of version 4 where there is one."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from hvdvae.cli import mpirun
from tests.system.conftest import clean_environment

PREFIX_OF_4 = "HVDVAE_TEST_OPENMPI4"
"""Environment variable: where an Open MPI 4 is that is neither on the path nor in /usr."""


@dataclass(frozen=True)
class OpenMpi:
    """An mpirun, and what makes this Python's mpi4py and Horovod use its library."""

    program: str
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Of a launch by it."""
        return clean_environment(**self.variables)


def own() -> OpenMpi:
    """The environment's; skips the test where that is another MPI."""
    program = shutil.which("mpirun", path=clean_environment()["PATH"])
    if program is None or not mpirun.name(program).startswith("Open MPI"):
        pytest.skip("launches over hosts are written for Open MPI")
    return OpenMpi(program)


def four() -> OpenMpi:
    """One of version 4 beside the environment's; skips the test where there is none."""
    found = _four()
    if found is None and PREFIX_OF_4 in os.environ:
        pytest.fail(f"{PREFIX_OF_4}: no Open MPI 4 in {os.environ[PREFIX_OF_4]}")
    if found is None:
        pytest.skip(f"no Open MPI 4 beside the environment's own ({PREFIX_OF_4} names the prefix of one)")
    return found


@cache
def _four() -> OpenMpi | None:
    own = shutil.which("mpirun", path=clean_environment()["PATH"])
    for prefix in _prefixes():
        for program in (prefix / "bin" / "mpirun.openmpi", prefix / "bin" / "mpirun"):
            libraries = [*prefix.glob("lib*/libmpi.so.40"), *prefix.glob("lib*/*/libmpi.so.40")]
            if not (program.exists() and libraries) or (own and os.path.samefile(program, own)):
                continue
            paths = [str(libraries[0].parent), os.environ.get("LD_LIBRARY_PATH", "")]
            variables = {
                "OPAL_PREFIX": str(prefix),
                "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
                "MPI4PY_LIBMPI": str(libraries[0]),
            }
            if mpirun.name(str(program), variables).startswith("Open MPI 4."):
                return OpenMpi(str(program), variables)
    return None


def _prefixes() -> Iterator[Path]:
    if PREFIX_OF_4 in os.environ:
        yield Path(os.environ[PREFIX_OF_4])
        return
    yield from (Path(place).parent for place in os.environ.get("PATH", "").split(os.pathsep) if place)
    yield Path("/usr")
