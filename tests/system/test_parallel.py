"""The parallel tests at two and four ranks, as `mpirun -np N pytest tests/parallel` and under horovodrun."""

import re

import pytest

from tests.system.conftest import ROOT, Start


@pytest.mark.parametrize(
    ("launcher", "ranks"), [("mpirun", 2), ("mpirun", 4), ("horovodrun-gloo", 2), ("horovodrun-mpi", 2)]
)
def test_all_laws_hold(start: Start, launcher: str, ranks: int) -> None:
    folder = str(ROOT / "tests" / "parallel")
    options = ("-p", "no:cacheprovider", "-q", "--color=no", "-c", str(ROOT / "pyproject.toml"))
    job = start(ranks, "-m", "pytest", *options, folder, launcher=launcher).finish(400)
    passed = re.search(r"(\d+) passed", job.output)
    assert job.status == 0, job.output
    assert passed, job.output
    assert int(passed[1]) >= 10, "nearly everything was skipped"
    print(job.output[-300:])
