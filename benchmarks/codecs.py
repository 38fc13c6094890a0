"""How fast codecs are on one core: GB of float32 a second that are encoded, and decoded.

    python benchmarks/codecs.py
    python benchmarks/codecs.py --elements 10000000 --rounds 9

All codecs take turns in each round, with a copy of the vector as the measure of what memory allows. Prints medians with
the least and greatest of the rounds, and targets.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

if (
    __name__ == "__main__"
):  # A script's own folder is on the path; the modules beside it are a package of the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.statistics_of_rounds import Spread, spread
from hvdvae.compression import CODECS, Averaged, Gathered, codec_of

COLUMNS = 1000
"""Of the matrix that powersgd sees."""
TARGETS = {"int8": 1.0, "sign": 1.0, "fp16": 1.0, "topk": 0.3}
"""GB/s of encoding."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=5_000_000, help="of the vector, in thousands whole [5000000]")
    parser.add_argument("--rounds", type=int, default=7, help="[7]")
    parser.add_argument("--seconds", type=float, default=0.2, help="of a codec and round [0.2]")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    vector = torch.randn(asked.elements // COLUMNS, COLUMNS).view(-1)
    sides = {name: work for codec in CODECS for name, work in sides_of(codec, vector).items()}
    target = torch.empty_like(vector)
    sides["copy"] = lambda: target.copy_(vector)
    rates: dict[str, list[float | None]] = {name: [] for name in sides}
    for _ in range(asked.rounds):
        for name, work in sides.items():
            rates[name].append(vector.nbytes / 1e9 / seconds_of(work, asked.seconds))
    print(f"{vector.numel():,} elements, one thread, {asked.rounds} rounds: GB/s of float32, median [least, greatest]")
    for name, found in rates.items():
        middle = spread(found)
        assert middle is not None
        print(f"{name:<20}{middle.median:8.2f} [{middle.low:.2f}, {middle.high:.2f}]{_verdict(name, middle)}")


def sides_of(name: str, vector: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of a codec."""
    codec = codec_of(name, [(vector.numel() // COLUMNS, COLUMNS)])
    if isinstance(codec, Averaged):
        return {f"{name} both": lambda: _talk(codec, vector)}
    return {f"{name} encode": _encode(codec, vector), f"{name} decode": _decode(codec, vector)}


def _encode(codec: Gathered, vector: Tensor) -> Callable[[], object]:
    message = torch.zeros(codec.nbytes, dtype=torch.uint8)
    return lambda: codec.encode(vector, message, 0)


def _decode(codec: Gathered, vector: Tensor) -> Callable[[], object]:
    message, total = torch.zeros(codec.nbytes, dtype=torch.uint8), torch.zeros_like(vector)
    codec.encode(vector, message, 0)
    return lambda: codec.add(message, total)


def _talk(codec: Averaged, vector: Tensor) -> None:
    for _ in codec.average(vector.clone(), torch.empty_like(vector), 0):
        pass


def seconds_of(work: Callable[[], object], least: float) -> float:
    """Of one call, in so many that they take `least` seconds; after one that does not count."""
    work()
    calls, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < least:
        work()
        calls += 1
    return elapsed / calls


def _verdict(name: str, found: Spread) -> str:
    codec, _, what = name.partition(" ")
    if what != "encode" or codec not in TARGETS:
        return ""
    return f"   target {TARGETS[codec]}: {'reached' if found.median >= TARGETS[codec] else 'missed'}"


if __name__ == "__main__":
    main()
