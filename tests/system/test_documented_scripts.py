"""Scripts of the documentation run as they stand, in one process and in two, and the second start resumes."""

import json
import re
from pathlib import Path

import pytest

from tests.system.conftest import ROOT, Start


def script(file: str, after: str) -> str:
    """The first block of Python after these words."""
    text = (ROOT / file).read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text[text.index(after) :], re.DOTALL)
    assert block is not None
    return block[1]


def epochs_of(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["epoch"] for line in lines if line["kind"] == "epoch"]


SCRIPTS = {
    "README": ("README.md", "With a loop of ours", "runs/mine", "epochs=5", "epochs=6", 6),
    "DataLoader": (
        "docs/own-loop.md",
        "## The Trainer with your own DataLoader",
        "runs/loader",
        "epochs=3",
        "epochs=4",
        4,
    ),
    "loop": (
        "docs/own-loop.md",
        "## Logging and checkpoints",
        "runs/loop",
        "EPOCHS, STEPS, folder = 4",
        "EPOCHS, STEPS, folder = 5",
        5,
    ),
}


@pytest.mark.parametrize(("which", "ranks"), [("README", 1), ("README", 2), ("DataLoader", 2), ("loop", 2)])
def test_a_script_runs_as_it_stands_and_goes_on(start: Start, tmp_path: Path, which: str, ranks: int) -> None:
    file, after, folder, few, more, last = SCRIPTS[which]
    code = script(file, after)
    launcher = "none" if ranks == 1 else "mpirun"
    (tmp_path / "first.py").write_text(code)
    first = start(ranks, "first.py", launcher=launcher).finish()
    assert first.status == 0, first.output
    assert epochs_of(tmp_path / folder) == [*range(1, last)]
    assert list((tmp_path / folder / "tensorboard").iterdir())
    assert code.count(few) == 1
    (tmp_path / "second.py").write_text(code.replace(few, more))
    second = start(ranks, "second.py", launcher=launcher).finish()
    assert second.status == 0, second.output
    assert epochs_of(tmp_path / folder) == [*range(1, last + 1)], "the epochs that were done are not done again"
    if which != "loop":
        assert second.output.count("hvdvae: resumed at step") == 1, second.output
        assert (tmp_path / folder / "checkpoints" / "best.safetensors").exists()
        assert all(
            "validation_loss" in line
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
            if '"kind": "epoch"' in line
        )
    if which == "DataLoader":
        best = set(re.findall(r"rank \d: step (\d+), best ([\d.]+)", second.output))
        assert len(best) == 1, second.output
        assert float(best.pop()[1]) < 6.0, "of 8 at the start: it has learned"
