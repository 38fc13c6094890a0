"""The parallel tests at two and four ranks, as `mpirun -np N pytest tests/parallel` and under horovodrun."""

import re

import pytest

from tests.system.conftest import ROOT, Start

LAUNCHERS = ("world", "allreduce", "horovod_options", "trainer_laws", "same_start", "grad_scaler", "sync_batch_norm")
"""What depends on who has started the ranks; all else is the same once they have met."""
SPLITTING = ("pipeline", "tensor")
"""Where three ranks are not a case between two and four."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [("mpirun", 2), ("mpirun", 3), ("mpirun", 4), ("horovodrun-gloo", 2), ("horovodrun-mpi", 2)],
)
def test_all_laws_hold(start: Start, launcher: str, ranks: int) -> None:
    folder = ROOT / "tests" / "parallel"
    some = LAUNCHERS if "horovodrun" in launcher else SPLITTING if ranks == 3 else ()
    named = [str(folder / f"test_{name}.py") for name in some] or [str(folder)]
    options = ("-p", "no:cacheprovider", "-q", "--color=no", "-c", str(ROOT / "pyproject.toml"))
    job = start(ranks, "-m", "pytest", *options, *named, launcher=launcher).finish(800)
    passed = re.search(r"(\d+) passed", job.output)
    assert job.status == 0, job.output
    assert passed, job.output
    assert int(passed[1]) >= 10, "nearly everything was skipped"
    print(job.output[-300:])
