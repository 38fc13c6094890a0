"""hvdvae doctor: what it makes of each answer, its verdict and exit status, and one real run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvdvae.cli import checks, doctor, mpirun, probes
from hvdvae.cli.finding import Finding, verdict
from hvdvae.cli.probes import Answer

BROKEN = Answer(error="ImportError: no such thing")
TORCH = Answer(facts={"version": "2.13.0+cpu", "cuda": None, "gpus": []})
TORCH_CUDA = Answer(facts={"version": "2.13.0", "cuda": "13.0", "gpus": ["NVIDIA H200"]})
MPI = Answer(
    facts={
        "version": "4.1.2",
        "library": "Open MPI v5.0.11, package: Open MPI user@host Distribution",
        "libmpi": ["/env/lib/libmpi.so.40"],
        "standard": "3.1",
        "threads": "MULTIPLE",
    }
)
HOROVOD = Answer(
    facts={
        "version": "0.28.1",
        "mpi": True,
        "gloo": True,
        "nccl": False,
        "torch": "2.13.0+cpu",
        "libmpi": ["/env/lib/libmpi.so.40"],
    }
)


def but(answer: Answer, **facts: object) -> Answer:
    return Answer(facts=answer.facts | facts)


WELL = [
    checks.python(),
    checks.torch(TORCH),
    checks.mpi(MPI),
    checks.threads(MPI),
    checks.launcher_program("/env/bin/mpirun", "/env/bin/mpirun", "Open MPI 5.0.11", MPI),
    checks.ulfm(Answer(facts={"size": 2, "agreed": 1})),
    checks.horovod(HOROVOD),
    checks.built_for(HOROVOD, TORCH, MPI),
    checks.gpu(TORCH, False, HOROVOD),
    checks.gpu(TORCH_CUDA, True, but(HOROVOD, nccl=True)),
    checks.launcher({}),
    checks.cores(2, float("inf"), 2),
    checks.pair("mpi", Answer(facts={"size": 2, "total": 3})),
    checks.pair("horovod", Answer(facts={"size": 2, "total": 3.0})),
]

FAILING = {
    "torch": (checks.torch(BROKEN), "all"),
    "MPI": (checks.mpi(BROKEN), "parallel"),
    "mpirun absent": (checks.launcher_program(None, None, "", MPI), "parallel"),
    "mpirun of another": (checks.launcher_program("/m", "/m", "MPICH 5.0.2", MPI), "parallel"),
    "Horovod": (checks.horovod(BROKEN), "horovod"),
    "Horovod without MPI": (checks.horovod(but(HOROVOD, mpi=False)), "horovod"),
    "Horovod for another torch": (checks.built_for(but(HOROVOD, torch="2.14.1"), TORCH, MPI), "horovod"),
    "Horovod for another MPI": (checks.built_for(but(HOROVOD, libmpi=["/usr/lib/x"]), TORCH, MPI), "horovod"),
    "no allreduce": (checks.pair("mpi", BROKEN), "parallel"),
    "two worlds of size 1": (checks.pair("mpi", Answer(facts={"size": 1, "total": 1})), "parallel"),
    "wrong sum": (checks.pair("horovod", Answer(facts={"size": 2, "total": 2.0})), "horovod"),
}


@pytest.mark.parametrize("finding", WELL, ids=lambda finding: finding.topic)
def test_what_is_well_has_no_remedy(finding: Finding) -> None:
    assert finding.mark == "ok"
    assert finding.remedy == ""


@pytest.mark.parametrize("name", FAILING)
def test_what_fails_has_a_remedy_and_fails_the_whole(name: str) -> None:
    finding, breaks = FAILING[name]
    assert (finding.mark, finding.breaks) == ("FAIL", breaks)
    assert finding.remedy
    assert finding.remedy in str(finding).splitlines()[1]
    assert verdict([*WELL, finding])[1] == 1


def test_the_reason_of_a_broken_import_is_shown() -> None:
    for finding in (checks.torch(BROKEN), checks.mpi(BROKEN), checks.horovod(BROKEN)):
        assert BROKEN.error in finding.text


def test_verdict_says_what_still_works() -> None:
    assert verdict(WELL) == ("Training works here, in one process and in parallel.", 0)
    assert "--engine mpi" in verdict([*WELL, FAILING["Horovod"][0]])[0]
    without_mpi = verdict([*WELL, FAILING["Horovod"][0], FAILING["MPI"][0]])[0]
    assert "--strategy local" in without_mpi
    assert "--engine mpi" not in without_mpi
    assert "does not work" in verdict([FAILING["MPI"][0], FAILING["torch"][0]])[0]


def test_notes_have_a_remedy_and_fail_nothing() -> None:
    notes = [
        checks.threads(but(MPI, threads="FUNNELED")),
        checks.ulfm(BROKEN),
        checks.launcher_program("/env/bin/mpirun", "/usr/bin/mpirun", "Open MPI 5.0.11", MPI),
        checks.gpu(TORCH, True, HOROVOD),
        checks.gpu(TORCH_CUDA, True, HOROVOD),
        checks.cores(8, 1.0, 2),
    ]
    assert [note.mark for note in notes] == ["note"] * len(notes)
    assert verdict(notes)[1] == 0


def test_the_quota_of_a_control_group_counts() -> None:
    assert "0.5 a rank" in checks.cores(64, 1.0, 2).text
    assert "32 a rank" in checks.cores(64, float("inf"), 2).text


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to", "Open MPI 5.0.11"),
        ("mpirun (Open MPI) 4.1.4\n", "Open MPI 4.1.4"),
        ("mpirun.openmpi (OpenRTE) 4.1.4\n", "Open MPI 4.1.4"),
        ("Open MPI v5.0.11, package: Open MPI user@localhost Distribution", "Open MPI 5.0.11"),
        ("HYDRA build details:\n    Version:           5.0.2\n    Release Date: x", "MPICH 5.0.2"),
        ("MPICH Version:\t5.0.2\nMPICH Release date:\tx", "MPICH 5.0.2"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005", "Intel MPI 2021.11"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS\n", "Intel MPI 2021.11"),
        ("Something else 1.0\nmore", "Something else 1.0"),
    ],
)
def test_library_and_launcher_of_one_mpi_have_one_name(said: str, name: str) -> None:
    assert mpirun.parse_name(said) == name


def test_flags_follow_the_mpi() -> None:
    def flags(maker: str) -> list[str]:
        return mpirun.command("m", maker, 2)[3:]

    assert flags("Open MPI 4.1.4") == ["--oversubscribe", "--bind-to", "none"]
    assert flags("Open MPI 5.0.11") == ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    assert flags("Open MPI 10.0.1") == flags("Open MPI 5.0.11")
    assert flags("MPICH 5.0.2") == ["-bind-to", "none"]
    assert flags("Something else 1.0") == []


def test_an_outer_launch_leaves_no_trace() -> None:
    site = {"OMPI_MCA_btl": "tcp,self", "PMIX_MCA_psec": "native", "OPAL_PREFIX": "/env", "HOME": "/home/u"}
    outer = {"PMIX_RANK": "1", "PMI_SIZE": "4", "SLURM_JOB_ID": "7", "HOROVOD_RANK": "1"}
    inner = mpirun.environment(site | outer)
    assert not outer.keys() & inner.keys()
    assert site.items() <= inner.items()
    inside = mpirun.environment(site | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_num_procs": "2"})
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"}
    assert {key for key in inside if key.startswith("OMPI_")} <= allowed


def test_a_probe_that_crashes_hangs_or_raises_is_an_answer() -> None:
    assert probes.ask("tell(size=2)") == Answer(facts={"size": 2})
    assert probes.ask("raise ValueError('of the probe')").error == "ValueError: of the probe"
    assert "-11" in probes.ask("os.kill(os.getpid(), 11)").error
    assert "within 1 s" in probes.ask("import time; time.sleep(60)", seconds=1).error
    assert probes.ask("pass").error


def test_a_hanging_probe_takes_its_children_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
import subprocess, time
child = subprocess.Popen(["sleep", "60"])
open({str(note)!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    assert "within" in probes.ask(code, seconds=2).error
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_only_the_first_rank_examines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([FAILING["MPI"][0]]))
    monkeypatch.setattr(doctor, "detect", lambda environ: doctor_launch(rank=1))
    assert doctor.doctor() == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(doctor, "detect", lambda environ: doctor_launch(rank=0))
    assert doctor.doctor() == 1
    assert FAILING["MPI"][0].remedy in capsys.readouterr().out


def doctor_launch(rank: int) -> object:
    from hvdvae.launcher import Launch

    return Launch(launcher="mpirun", rank=rank, size=2)


@pytest.mark.mpi
@pytest.mark.skipif(mpirun.find() is None, reason="no mpirun")
def test_a_real_run_answers_every_point() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from hvdvae.cli.doctor import doctor; raise SystemExit(doctor())"],
        capture_output=True,
        text=True,
        timeout=250,
        env=mpirun.environment(os.environ) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    topics = ("Python", "torch", "MPI", "mpirun", "Horovod", "GPU", "launcher", "cores")
    for topic in topics:
        assert any(line[6:].startswith(topic) for line in lines), topic
    assert (run.returncode == 0) == (not any(line.startswith("FAIL") for line in lines))
    if run.returncode == 0:
        assert "ok    2 ranks, mpi     allreduce of 1 and 2 gave 3" in lines
        assert "ok    2 ranks, horovod allreduce of 1 and 2 gave 3" in lines


def test_mpirun_of_the_environment_comes_before_the_one_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("environment", "site"):
        (tmp_path / name).mkdir()
    site = tmp_path / "site" / "mpirun"
    site.write_text("#!/bin/sh\n")
    site.chmod(0o755)
    monkeypatch.setenv("PATH", str(site.parent))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    assert mpirun.find() == str(site) == shutil.which("mpirun")
    own = tmp_path / "environment" / "mpirun"
    own.write_text("#!/bin/sh\n")
    assert mpirun.find() == str(own)


def test_the_mpirun_of_the_library_in_use_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, version in (("environment", "5.0.11"), ("site", "4.1.4")):
        program = tmp_path / place / "mpirun"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\necho 'mpirun (Open MPI) {version}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'site'}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    own, site = str(tmp_path / "environment" / "mpirun"), str(tmp_path / "site" / "mpirun")
    assert mpirun.of_library("Open MPI 4.1.4") == (site, "Open MPI 4.1.4")
    for library in ("Open MPI 5.0.11", "Open MPI 3.0.0", ""):
        assert mpirun.of_library(library) == (own, "Open MPI 5.0.11")
