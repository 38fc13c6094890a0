"""What fewer bytes cost in test likelihood after equal examples: `hvdvae train` of each way, on several seeds.

    python benchmarks/likelihoods.py --data mnist            # about half a minute a way and seed
    python benchmarks/likelihoods.py --epochs 1 --seeds 0    # on the digits: does it run?

Two ranks, MLP 784-400-z20. Prints the test NLL of each way less that of uncompressed gradients of the same seed, and
writes likelihoods.json into --output.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # A script's own folder is on the path; the packages are beside it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.machine import machine
from hvdvae.cli import mpirun
from hvdvae.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[1]
BASE = "none"
WAYS = {
    BASE: "",
    "fp16": "--compression fp16",
    "bf16": "--compression bf16",
    "int8": "--compression int8",
    "diloco, int8": "--strategy diloco --sync-every 32 --compression int8",
    "local-sgd, int8": "--strategy local-sgd --sync-every 16 --compression int8",
}
MODEL = "--model mlp --hidden 400 --latent 20 --activation relu --batch-size 128 --lr 2e-3 --threads 1"
QUIET = "--pictures-every 0 --keep 1 --validate-every 1000"


def command(asked: argparse.Namespace, way: str, seed: int, folder: Path) -> list[str]:
    """Of one run."""
    program = mpirun.find()
    if program is None:
        raise SystemExit("found no mpirun on PATH or beside this Python: run launch/install.sh, or load your MPI")
    words = f"{MODEL} {QUIET} --data {asked.data} --epochs {asked.epochs} --nll-samples {asked.nll_samples}"
    rest = f"{words} --seed {seed} --out {folder} {WAYS[way]}"
    launch = mpirun.command(program, mpirun.name(program), 2)
    return [*launch, sys.executable, "-m", "hvdvae", "train", "--strategy", "allreduce", *shlex.split(rest)]


def test_nll(asked: argparse.Namespace, way: str, seed: int) -> float:
    """Nats per example of the test set. Blocks; raises CalledProcessError where the run fails."""
    environment = mpirun.environment(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        subprocess.run(command(asked, way, seed, folder), env=environment, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return float(found["test_nll"])


def differences(found: dict[str, dict[int, float]], way: str) -> list[float]:
    """Of a way from uncompressed gradients, a seed. Pure."""
    return [nll - found[BASE][seed] for seed, nll in found[way].items()]


def line(found: dict[str, dict[int, float]], way: str) -> str:
    """Of the table. Pure."""
    less = differences(found, way)
    absolute = statistics.median(found[way].values())
    return f"{way:<18}{absolute:9.2f}   {statistics.median(less):+.2f} [{min(less):+.2f}, {max(less):+.2f}]"


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="as of hvdvae train [digits]")
    parser.add_argument("--epochs", type=int, default=7, help="[7]")
    parser.add_argument("--nll-samples", type=int, default=200, help="importance samples an example [200]")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between [0,1,2]")
    parser.add_argument("--output", type=Path, help="folder [benchmarks/results/likelihoods-DATE]")
    asked = parser.parse_args()
    found: dict[str, dict[int, float]] = {}
    print(f"{asked.data}, {asked.epochs} epochs: test NLL (k={asked.nll_samples}), and less that of uncompressed")
    for way in WAYS:
        found[way] = {seed: test_nll(asked, way, seed) for seed in map(int, asked.seeds.split(","))}
        print(line(found, way), flush=True)
    folder = asked.output or ROOT / "benchmarks" / "results" / f"likelihoods-{datetime.now(UTC):%Y-%m-%d}"
    folder.mkdir(parents=True, exist_ok=True)
    order = {"command": shlex.join(["python", "benchmarks/likelihoods.py", *sys.argv[1:]]), "model": MODEL}
    record = {**machine(), **order, "ways": WAYS, "test_nll": found}
    write_whole(folder / "likelihoods.json", json.dumps(record, indent=2) + "\n")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
