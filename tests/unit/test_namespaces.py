"""A launch over hosts that are namespaces: each Open MPI gets the flags that it knows."""

import shlex
from pathlib import Path

import pytest

from benchmarks.study.namespaces import Network


@pytest.mark.parametrize(
    ("version", "known", "unknown"),
    [
        ("4.1.4", ["--mca btl self,vader,tcp", "--mca oob_tcp_if_include 10.77.0.0/24", "--mca plm_rsh_agent"], "prte"),
        (
            "5.0.11",
            ["--mca btl self,sm,tcp", "--prtemca prte_if_include 10.77.0.0/24", "--prtemca plm_ssh_agent"],
            "oob",
        ),
    ],
)
def test_flags_follow_the_version(tmp_path: Path, version: str, known: list[str], unknown: list[str]) -> None:
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/sh\necho 'mpirun (Open MPI) {version}'\n")
    program.chmod(0o755)
    agent, first, launch = Network(["10.77.0.1", "10.77.0.2"], Path("agent")).mpirun(str(program), ["a job"], each=2)
    assert (agent, first) == ("agent", "10.77.0.1")
    assert shlex.split(launch)[-1] == "a job"
    assert "--host 10.77.0.1:2,10.77.0.2:2 -np 4" in launch
    assert [words for words in known if words not in launch] == []
    assert unknown not in launch
