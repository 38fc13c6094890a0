"""Every command that README and docs/ show in a block runs as it stands: with small data, one epoch, few samples.

A block whose commands cannot run here is marked above: <!-- not run: BEGINNING OF THE COMMANDS, and why -->.
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.system.conftest import ROOT, Launch, clean_environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- not run: ([^\n]*?) -->\n)?```(?:bash|sh|shell|console)\n(.*?)```", re.DOTALL)
SHORT = "--epochs 1 --nll-samples 2 --hidden 8 8 --latent 2 --threads 1 --pictures-every 0"
PROVIDED = ("PRTE_MCA_rmaps_default_mapping_policy", "OMPI_MCA_rmaps_base_oversubscribe")
"""What the tests' own environment has, and a user's has not unless README says so."""


class Shown(NamedTuple):
    """A command of a page."""

    block: str
    """The page, and the number of the block in it."""
    line: str
    is_run: bool


def commands(page: str, text: str) -> Iterator[Shown]:
    """Of all shell blocks of a page, in order; comments are left out, lines that go on are joined."""
    for number, found in enumerate(_BLOCK.finditer(text), 1):
        for line in found[2].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                said = " ".join(line.partition(" #")[0].split())
                marked = found[1] or ""
                is_run = words[0] not in re.findall(r"[\w./-]+", marked) and " ".join(words[:2]) not in (marked or "-")
                yield Shown(f"{page} {number}", said, is_run)


SHOWN = [one for page in PAGES for one in commands(page.name, page.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: a checkout, data of one's own, a file of options, a script."""
    here = tmp_path_factory.mktemp("reader")
    for name in ("launch", "benchmarks"):
        (here / name).symlink_to(ROOT / name)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
    np.savez(here / "images.npz", train=pixels, test=pixels[:16] ^ 255)
    np.save(here / "new.npy", pixels ^ 85)
    (here / "images").mkdir()
    for number, image in enumerate(pixels[:40]):
        Image.fromarray(image).save(here / "images" / f"{number}.png")
    (here / "study.yaml").write_text("data: images.npz\nlr: 0.002\n")
    (here / "train.py").write_text("import hvdvae\n")
    return here


def shortened(line: str) -> str:
    """The same command on small data, for one epoch. Pure."""
    line = line.replace("--data mnist", "--data images.npz")
    before, dashes, _ = line.partition(" -- ")
    if dashes or " train" not in before or before.startswith("hvdvae slurm"):
        # An evaluation of 5000 samples an example is as long as a training.
        return f"{line} --samples 2" if " evaluate " in line else line
    data = "" if "--data" in line or "--config" in line or "--resume" in line else " --data images.npz"
    return f"{line}{data} {SHORT.replace('--hidden 8 8', '--hidden 4 8') if '--model conv' in line else SHORT}"


def test_every_page_with_commands_is_found_and_little_is_left_out() -> None:
    assert {one.block.split()[0] for one in SHOWN} >= {"README.md"}
    left_out = {one.line.split()[0] for one in SHOWN if not one.is_run}
    assert left_out <= {"launch/demo.sh", "launch/test.sh", "python", "sbatch"}
    assert sum(one.is_run for one in SHOWN) >= 20
    assert sum(bool(re.search(r"-np [3-9]", one.line)) for one in SHOWN if one.is_run) >= 3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", dict.fromkeys(one.block for one in SHOWN if one.is_run))
def test_they_run_one_after_the_other(folder: Path, block: str) -> None:
    """In order, as what one leaves the next may use; what was exported before stays so."""
    if shutil.which("mpirun", path=clean_environment()["PATH"]) is None:
        pytest.skip("mpirun is not on PATH")
    environment = {name: value for name, value in clean_environment().items() if name not in PROVIDED}
    failed = []
    for one in SHOWN:
        if one.line.startswith("export "):
            environment |= dict(word.split("=", 1) for word in shlex.split(one.line)[1:])
            continue
        if one.block != block or not one.is_run:
            continue
        job = Launch(["bash", "-c", shortened(one.line)], environment, folder).finish(120)
        # 1: memory says that a model does not fit here, doctor that something is missing.
        fine = (0, 1) if re.match(r"hvdvae (memory|doctor)", one.line) else (0,)
        if job.status not in fine or "Traceback" in job.output:
            failed.append(f"{one.block}: {one.line}\nstatus {job.status}\n{job.output[-1500:]}")
    assert not failed, "\n\n".join(failed)


def test_what_marks_a_command_as_not_run_is_read() -> None:
    text = "<!-- not run: sbatch needs Slurm -->\n```bash\nhvdvae doctor  # here\nsbatch job\n```\n"
    text += "```bash\na \\\n  b\n```\n"
    assert [(one.line, one.is_run) for one in commands("x", text)] == [
        ("hvdvae doctor", True),
        ("sbatch job", False),
        ("a b", True),
    ]
