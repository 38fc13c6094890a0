"""Strong and weak scaling: throughput at more and more ranks, against as many times one.

    python benchmarks/scaling.py                                   # np 1, 2, 4 on digits: some minutes
    python benchmarks/scaling.py --data mnist --batch-size 128 --sizes 1,2,4,8

strong: all ranks together take --batch-size examples a step. weak: each rank does. Every size is a launch of its own,
as in compare.py, and a run that was stopped goes on. More ranks than cores are labelled as oversubscribed. Writes
report.html of both, a picture, and a JSON file a cell into --output.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.statistics_of_rounds import spread
from benchmarks.study.findings import Condition, conditions, shown
from benchmarks.study.located import StudyError
from benchmarks.study.page import write_page
from benchmarks.study.run import run
from benchmarks.study.study_file import Study, parse
from benchmarks.study.table import efficiency
from hvdvae.data import open_dataset
from hvdvae.errors import DataError

RESULTS = Path(__file__).resolve().parent / "results"
STUDY = """\
title: {Mode} scaling
data: {data}
train: {{model: {model}, batch_size: {batch}}}
strong_scaling: {strong}
world_sizes: [{sizes}]
seeds: [{seeds}]
target: {{contender: allreduce, epochs: {epochs}}}
budget: {{epochs: {epochs}, seconds: {seconds}}}
snapshot_epochs: {epochs}
nll_samples: 1
contenders:
{contenders}
scenarios:
  uniform:
"""
CONTENDERS = {
    "one-process": "{strategy: local}",
    "allreduce": "{strategy: allreduce, engine: mpi}",
    "allreduce-horovod": "{strategy: allreduce, engine: horovod}",
    "sharded": "{strategy: sharded, engine: mpi}",
    "asp": "{strategy: ps}",
    "bsp": "{strategy: ps, consistency: bsp}",
    "raw-horovod": "{peer: horovod}",
    "ddp": "{peer: ddp}",
}
ALWAYS = ("one-process", "allreduce")
"""What efficiency is measured against, and the one whose epochs the others have."""


def options() -> argparse.Namespace:
    """The command line; exits with 2 on a bad one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as of hvdvae train [digits]")
    parser.add_argument("--model", default="mlp", help="as of hvdvae train [mlp]")
    parser.add_argument("--batch-size", type=int, default=128, help="of all ranks (strong), of each (weak) [128]")
    parser.add_argument("--sizes", default="1,2,4", help="numbers of ranks that train [1,2,4]")
    parser.add_argument("--seeds", default="0,1,2", help="[0,1,2]")
    parser.add_argument(
        "--contenders",
        nargs="*",
        choices=[name for name in CONTENDERS if name not in ALWAYS],
        default=[*CONTENDERS],
        help=f"besides {' and '.join(ALWAYS)} [all]",
    )
    parser.add_argument("--epochs", type=float, default=40, help="of a run [40]")
    parser.add_argument("--seconds", type=float, default=60, help="of a run at most [60]")
    parser.add_argument("--output", type=Path, help="folder [benchmarks/results/scaling-DATE]")
    return parser.parse_args()


def main() -> int:
    """Measure, write, print. The exit status."""
    asked = options()
    folder = asked.output or RESULTS / f"scaling-{datetime.now(UTC):%Y-%m-%d}"
    try:
        open_dataset(asked.data)
        for mode in ("strong", "weak"):
            text = STUDY.format(
                Mode=mode.capitalize(),
                data=asked.data,
                model=asked.model,
                batch=asked.batch_size,
                strong=str(mode == "strong").lower(),
                sizes=asked.sizes,
                seeds=asked.seeds,
                epochs=asked.epochs,
                seconds=asked.seconds,
                contenders="\n".join(
                    f"  {name}: {way}" for name, way in CONTENDERS.items() if name in (*ALWAYS, *asked.contenders)
                ),
            )
            study = parse(text, f"{mode} scaling")
            cells = run(study, folder / mode)
            page = write_page(study, text, cells, folder / mode, " ".join(["python", *sys.argv]))
            cores = max(cell["machine"]["hardware"]["cores"] for cell in cells)
            print(
                "\n".join(
                    [f"\n{mode} scaling, batch {asked.batch_size}", *_lines(study, conditions(study, cells), cores)]
                )
            )
            print(f"report: {page}")
    except (StudyError, DataError) as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


def _lines(study: Study, found: list[Condition], cores: int) -> list[str]:
    """A line a contender and size: throughput, and efficiency against one process."""
    lines = [f"{'':<20}{'ranks':>6}{'examples/s':>28}{'efficiency':>24}"]
    alone = [rate for row in found[0].rows if row.alone for rate in row.rates]
    for name in study.contenders:
        for condition in found:
            for row in condition.rows:
                if row.contender != name or (row.alone and condition is not found[0]):
                    continue
                size = 1 if row.alone else condition.size
                share = efficiency(row, alone, size)
                label = " oversubscribed" if size > cores else ""
                lines.append(f"{name:<20}{size:>6}{shown(spread(row.rates), 0):>28}{shown(share, 2):>24}{label}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
