"""Runs the cells of a study, one after the other; each leaves a JSON file, so a study can be stopped and continued."""

import fcntl
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.study.cells import Cell, cells, order, same_question
from benchmarks.study.launch import JobFailed, Ranks, judge, run_ranks
from benchmarks.study.located import StudyError
from benchmarks.study.numbers import numbers
from benchmarks.study.study_file import Study
from hvdvae.regular_file import open_in_place, why
from hvdvae.whole_file import write_whole

START_SECONDS = 120.0
"""What a job may take besides its budget: to start, to open the data, to end."""
LOG_LINES = 40
AT_WORK = "at-work-"
LOCK = Path(tempfile.gettempdir()) / "hvdvae-study.lock"


def run(
    study: Study,
    folder: Path,
    *,
    retry_failed: bool = False,
    launcher: str | None = None,
    part: tuple[int, int] = (1, 1),
) -> list[dict[str, Any]]:
    """Run what has not been run yet. Blocks; returns the results of all cells that have one.

    `folder` gets cells/NAME.json and logs/NAME.txt. A result of another question (the study was changed) is measured
    anew. `launcher`: as launch.Ranks has it. `part` (2, 4): only every fourth cell, from the second on. Raises
    StudyError where another study runs on this machine.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    results = {}
    todo = []
    number, count = part
    at_work = f"{AT_WORK}{number}-of-{count}-"
    for place, cell in enumerate(cells(study), 1):
        result = _kept(folder, study, cell, retry_failed=retry_failed)
        if result is None and place % count == number % count:
            todo.append(cell)
        results[cell.name] = result
    with _alone(), tqdm(todo, unit="cell", file=sys.stderr, dynamic_ncols=True, smoothing=0) as progress:
        for left in folder.glob(f"{at_work}*"):  # Of a harness that was killed.
            shutil.rmtree(left)
        if there := sum(result is not None for result in results.values()):
            progress.write(f"{there} of {len(results)} cells are there already")
        for cell in progress:
            progress.set_postfix_str(cell.name)
            results[cell.name] = result = measure(study, cell, folder, launcher, at_work)
            _write(_file(folder, cell), result)
            if result["failed"]:
                progress.write(f"{cell.name}: {result['failed']} (logs/{cell.name}.txt)")
    return [result for result in results.values() if result is not None]


def results_in(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Those that are there, of the study as it is now."""
    found = (_kept(folder, study, cell, retry_failed=False) for cell in cells(study))
    return [result for result in found if result is not None]


def measure(study: Study, cell: Cell, output: Path, launcher: str | None, at_work: str) -> dict[str, Any]:
    """One cell, in a folder in `output` whose name begins with `at_work`. Blocks; a job that fails is a result, too."""
    ordered, log = order(study, cell), output / "logs" / f"{cell.name}.txt"
    log.unlink(missing_ok=True)
    begin = time.time()
    found: dict[str, Any] = {"points": [], "nll": None}
    with tempfile.TemporaryDirectory(prefix=at_work, dir=output) as place:
        folder = Path(place)
        _write(folder / "order.json", ordered)
        failed = None
        try:
            seconds = study.seconds + START_SECONDS
            survives = cell.scenario.kills and cell.contender.servers() > 0
            link = cell.scenario.link_mbit if cell.size > 1 else None
            run_ranks(folder, Ranks(cell.ranks, survives, link, launcher), log, seconds=seconds)
            judge(folder, log, seconds=seconds)
            found = {**json.loads((folder / "curve.json").read_text()), **_numbers(ordered, folder)}
        except (JobFailed, OSError) as error:
            failed = str(error)
    return {
        "name": cell.name,
        "contender": cell.contender.name,
        "size": cell.size,
        "scenario": cell.scenario.name,
        "seed": cell.seed,
        "failed": failed,
        **found,
        "log": log.read_text(errors="replace").splitlines()[-LOG_LINES:] if failed and log.exists() else [],
        "wall_seconds": time.time() - begin,
        "order": ordered,
        "machine": machine(),
    }


def _numbers(ordered: dict[str, Any], folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("rank-*.json"), key=lambda file: int(file.stem.split("-")[1]))
    if not files:
        raise JobFailed("ended well, but left no numbers")
    ranks = [(json.loads(file.read_text()), np.load(file.with_suffix(".npy"))) for file in files]
    servers = [json.loads(file.read_text()) for file in sorted(folder.glob("server-*.json"))]
    return {"epoch_examples": ranks[0][0]["examples"], **numbers(ordered, ranks, servers)}


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _kept(folder: Path, study: Study, cell: Cell, *, retry_failed: bool) -> dict[str, Any] | None:
    """The result of a cell, if there is one to this question."""
    try:
        result: dict[str, Any] = json.loads(_file(folder, cell).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    if not same_question(result["order"], order(study, cell)) or (retry_failed and result["failed"]):
        return None
    return result


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: the harness may be killed at any moment."""
    write_whole(path, json.dumps(content))


@contextmanager
def _alone() -> Iterator[None]:
    """Two studies on the same cores would measure each other."""
    try:
        held = open_in_place(LOCK)
    except OSError as error:
        raise StudyError(f"{LOCK}: {why(error, LOCK)}: remove it") from None
    with held as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another study is running on this machine (it holds {LOCK}): wait for its end") from None
        yield
