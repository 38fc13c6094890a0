"""Which way of parallelizing reaches a likelihood first, on this machine, under these conditions.

    python benchmarks/compare.py benchmarks/studies/two-minutes.yaml
    python benchmarks/compare.py STUDY.yaml --report-only       # the report anew, of what was measured

Runs the cells of a study one after the other, each as an mpirun of its own, and writes report.html, pictures/,
cells.csv and a JSON file a cell into --output. A study that was stopped goes on where it was when it is started again.
The exit status is 0 also where cells failed: the report shows them.
"""

import argparse
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.study.cells import cells
from benchmarks.study.findings import conditions, sentence
from benchmarks.study.gallery import NO_PICTURES, has_matplotlib
from benchmarks.study.located import StudyError
from benchmarks.study.own_model import model_of
from benchmarks.study.page import write_page
from benchmarks.study.run import results_in, run
from benchmarks.study.study_file import Study, open_study
from hvdvae.data import open_dataset
from hvdvae.errors import ConfigError, DataError

RESULTS = Path(__file__).resolve().parent / "results"


def options() -> argparse.Namespace:
    """The command line; exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a YAML file; benchmarks/studies/ has some")
    parser.add_argument(
        "--output", type=Path, help="folder [benchmarks/results/STUDY-DATE; of an unfinished run, its own]"
    )
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--launcher",
        help="starts the ranks, as 'srun --mpi=pmix -n {ranks}' in an allocation; all hosts must see --output "
        "[mpirun on this machine]",
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        help="as 2/4: measure every fourth cell from the second on, while others measure the rest into the same "
        "--output; --report-only makes the report of all",
    )
    parser.add_argument("--retry-failed", action="store_true", help="measure cells anew that failed")
    asked = parser.parse_args()
    if asked.launcher is not None and "{ranks}" not in asked.launcher:
        parser.error(f"--launcher: found {asked.launcher!r}, expected {{ranks}} in it, where the number goes")
    return asked


def main() -> int:
    """Measure, write, and say what was found. The exit status."""
    asked = options()
    try:
        study, text = open_study(asked.study)
        folder = asked.output or _folder(asked.study.stem, study, report_only=asked.report_only)
        if asked.report_only:
            found = results_in(study, folder)
            if not found:
                raise StudyError(
                    f"{folder} has no results of this study: run it without --report-only, or name --output"
                )
        else:
            if not has_matplotlib():
                print(f"compare: {NO_PICTURES}", file=sys.stderr)
            # What is not there should be known, or downloaded, before anything is measured.
            shape = open_dataset(study.data).shape
            model_of(study.build, next(iter(study.contenders.values())).config, shape, torch.device("cpu"))
            found = run(study, folder, retry_failed=asked.retry_failed, launcher=asked.launcher, part=asked.part)
    except (StudyError, DataError, ConfigError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare: stopped; the same command goes on", file=sys.stderr)
        return 130
    if asked.part != (1, 1):
        print(f"part {'/'.join(map(str, asked.part))} is done: {len(found)} of {len(cells(study))} cells are there")
        return 0
    words = [word for word in sys.argv[1:] if word != "--report-only"]
    command = shlex.join(["python", "benchmarks/compare.py", *words])
    page = write_page(study, text, found, folder, command)
    print(_summary(study, found, len(cells(study))))
    print(f"\nreport: {page}{'' if has_matplotlib() else ' (without pictures: matplotlib is not installed)'}")
    return 0


def _part(words: str) -> tuple[int, int]:
    """2/4 as numbers."""
    number, _, count = words.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"found {words!r}, expected as 2/4: the second of four parts")
    return int(number), int(count)


def _folder(name: str, study: Study, *, report_only: bool) -> Path:
    """Of the last run of this study, if it was not finished, or is to be reported; else one of today."""
    earlier = sorted(RESULTS.glob(f"{name}-????-??-??"))
    if earlier and (report_only or len(results_in(study, earlier[-1])) < len(cells(study))):
        return earlier[-1]
    return RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d}"


def _summary(study: Study, found: list[dict[str, object]], total: int) -> str:
    lines = [f"{study.title}: {len(found)} of {total} cells"]
    lines += [f"{one.scenario}, {one.size} ranks: {sentence(one)}" for one in conditions(study, found)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
