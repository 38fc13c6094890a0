"""launch: what the scripts refuse, how they call each MPI, that an installed environment stays as it is."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def bash(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code after sourcing launch/mpi.sh."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "{LAUNCH}/mpi.sh"\n{code}'],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables,
    )


def script(path: Path, said: str) -> Path:
    """An executable that says something."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'SAID'\n{said}\nSAID\n")
    path.chmod(0o755)
    return path


def fresh_copy(folder: Path) -> Path:
    """The project's launch files in a folder, without an environment."""
    folder.mkdir()
    shutil.copytree(LAUNCH, folder / "launch")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def install(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(folder / "launch" / "install.sh"), *options],
        capture_output=True,
        text=True,
        timeout=280,
        cwd="/",
        env=dict(os.environ) | variables,
    )


@pytest.mark.skipif(
    not (ROOT / ".venv" / "hvdvae" / "test.digest").exists(), reason="launch/install.sh --test has not run"
)
def test_a_second_run_changes_nothing_and_says_what_was_chosen() -> None:
    assert install(ROOT, "--test").returncode == 0  # Whatever was edited since.
    marker = (ROOT / ".venv" / "hvdvae" / "native.key").stat().st_mtime_ns
    run = install(ROOT, "--test")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("install: up to date\n")
    for what in ("python", "torch", "mpi", "horovod", "gpu"):
        assert f"\n{what} " in run.stdout
    assert (ROOT / ".venv" / "hvdvae" / "native.key").stat().st_mtime_ns == marker


@pytest.mark.parametrize(
    ("options", "variables", "words"),
    [
        (("--tset",), {}, ("--tset", "expected --test")),
        ((), {"HVDVAE_TORCH": "gpu"}, ("HVDVAE_TORCH", "'gpu'", "cpu or cuda")),
        ((), {"HVDVAE_PYTHON": "python-of-nobody"}, ("python-of-nobody", "3.11", "HVDVAE_PYTHON")),
        (
            (),
            {"HVDVAE_MPI": "path", "PATH": "/usr/bin:/bin", "HVDVAE_PYTHON": sys.executable},
            ("HVDVAE_MPI", "module"),
        ),
    ],
    ids=["option", "torch", "python", "mpi"],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, options: tuple[str, ...], variables: dict[str, str], words: tuple[str, ...]
) -> None:
    if "HVDVAE_MPI" in variables and shutil.which("mpicc", path=variables["PATH"]):
        pytest.skip("this system has an MPI in /usr/bin")
    folder = fresh_copy(tmp_path / "project")
    run = install(folder, *options, **variables)
    assert run.returncode == 1
    for word in words:
        assert word in run.stderr
    assert not (folder / ".venv" / "bin").exists()


def test_a_path_with_a_space_is_refused(tmp_path: Path) -> None:
    run = install(fresh_copy(tmp_path / "my project"))
    assert run.returncode == 1
    assert "has a space" in run.stderr


@pytest.mark.parametrize(
    ("said", "flags"),
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to", "-np 2 --oversubscribe --bind-to none"),
        ("mpirun.openmpi (OpenRTE) 4.1.4\n\nReport bugs to", "-np 2 --oversubscribe --bind-to none"),
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to", "-np 2 --map-by :OVERSUBSCRIBE --bind-to none"),
        ("HYDRA build details:\n    Version:         5.0.2\n    Release Date: x", "-np 2 -bind-to none"),
        ("Something else 1.0", "-np 2"),
    ],
    ids=["Open MPI 4", "Debian's Open MPI 4", "Open MPI 5", "MPICH", "unknown"],
)
def test_each_mpirun_is_called_as_it_wants(tmp_path: Path, said: str, flags: str) -> None:
    mpirun = script(tmp_path / "mpirun", said)
    run = bash(f'mpirun_command 2 "{mpirun}"; echo "${{MPIRUN_COMMAND[@]}}"')
    assert run.stdout.strip() == f"{mpirun} {flags}"


def test_the_mpi_on_path_is_taken_but_not_the_environments_own(tmp_path: Path) -> None:
    tools = "/usr/bin:/bin"
    for place in ("site/bin", "half/bin", ".venv/bin"):
        script(tmp_path / place / "mpirun", "x")
        if place != "half/bin":
            script(tmp_path / place / "mpicc", "x")

    def found(*places: str, **variables: str) -> str:
        path = ":".join([*(str(tmp_path / place) for place in places), tools])
        code = f'find_mpi "{tmp_path}/.venv"; echo "$MPI_KIND $MPICC $MPIRUN"'
        return bash(code, PATH=path, **variables).stdout.strip().replace(str(tmp_path), "")

    site, wheel = "site /site/bin/mpicc /site/bin/mpirun", "wheel /.venv/bin/mpicc /.venv/bin/mpirun"
    assert found("site/bin") == site
    assert found(".venv/bin", "site/bin") == site
    assert found("site/bin", HVDVAE_MPI="wheel") == wheel
    if not shutil.which("mpicc", path=tools):
        assert found(".venv/bin") == wheel
        assert found("half/bin") == wheel


def test_an_inner_launch_does_not_see_the_outer_one() -> None:
    outer = {"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1", "PMI_RANK": "1", "SLURM_JOB_ID": "7"}
    site = {"OMPI_MCA_btl": "tcp,self", "PMIX_MCA_psec": "native", "OPAL_PREFIX": "/env"}
    left = bash("leave_launch; env", **outer, **site).stdout
    for name in outer:
        assert f"{name}=" not in left
    for name, value in site.items():
        assert f"{name}={value}" in left


@pytest.mark.parametrize(
    ("header", "version", "standard"),
    [
        ("#error C++17 or later compatible compiler is required to use ATen.", "2.13.0+cpu", "17"),
        ("#error C++20 or later compatible compiler is required to use ATen.", "2.14.1", "20"),
        ("#error C++23 or later compatible compiler is required to use ATen.", "3.0.0", "23"),
        ("// says nothing", "2.13.0+cpu", "17"),
        ("// says nothing", "2.14.1+cu130", "20"),
        ("// says nothing", "2.9.1", "17"),
    ],
)
def test_the_cxx_standard_is_read_off_the_headers(tmp_path: Path, header: str, version: str, standard: str) -> None:
    script(tmp_path / "bin" / "python", str(tmp_path))
    aten = tmp_path / "torch" / "include" / "ATen" / "ATen.h"
    aten.parent.mkdir(parents=True)
    aten.write_text(f"#pragma once\n{header}\n")
    names = " ".join(f"{name}={tmp_path}" for name in ("venv", "state", "requirements", "launch", "cache"))
    run = bash(f'{names}\nsource "{LAUNCH}/horovod/build.sh"\ncxx_standard {version}')
    assert run.stdout.strip() == standard, run.stderr


def test_torn_packages_are_forgotten_and_whole_ones_kept(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False, symlinks=True)
    python = tmp_path / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip())
    records = {"whole": "whole.py,,\n__pycache__/whole.pyc,,\n", "gone": "gone.py,,\n", "cut": None}
    for name, record in records.items():
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if record is not None:
            (info / "RECORD").write_text(record)
    (site / "whole.py").write_text("")
    (tmp_path / "pins.txt").write_text("# three\nwhole==1.0\ngone==1.0 --hash=sha256:00\ncut==1.0  # last\n")

    def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [python, LAUNCH / "installed.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert installed("pins.txt").returncode == 0
    mended = installed("--mend").stdout
    assert "gone-1.0" in mended
    assert "cut-1.0" in mended
    assert "whole" not in mended
    after = installed("pins.txt")
    assert after.returncode == 1
    assert after.stdout.splitlines() == ["gone: absent, expected 1.0", "cut: absent, expected 1.0"]
