"""What the numbers are held against: each ratio with its target, and whether its median reached it. Pure.

Keys are those of the sides (sides.py). Ratios compare blocks of the same round.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.statistics_of_rounds import Rounds, Spread, paired_ratios, spread

EFFICIENCY = 0.95
DDP = {"mlp": 1.7, "conv": 1.0}
RAW_HOROVOD = 1.0
PYTHAE = 1.25
OVERHEAD = 0.03
BF16 = 1.7
DATA_COPIES = 1.1
"""Of the uint8 bytes; the rest allows for the pages of the libraries that read them."""

OURS = {"mpi": "engine mpi", "horovod": "engine horovod"}
OTHERS = {"raw_horovod": "raw Horovod", "ddp": "DDP", "apart": "two that exchange nothing"}


@dataclass(frozen=True)
class Verdict:
    """One line of the report."""

    model: str
    what: str
    found: Spread | None
    """None where it was not measured."""
    target: float | None = None
    """None: for information."""
    at_most: bool = False
    """Whether smaller is better."""
    note: str = ""

    @property
    def outcome(self) -> str:
        """reached, missed, not measured, or nothing where there is no target."""
        if self.found is None:
            return "not measured"
        if self.target is None:
            return ""
        reached = self.found.median <= self.target if self.at_most else self.found.median >= self.target
        return "reached" if reached else "missed"


def verdicts(content: Mapping[str, Any]) -> list[Verdict]:
    """All ratios of a result file (record.Record), model by model, then memory."""
    bf16 = bool(content["hardware"]["avx512_bf16"])
    found = []
    for model, measured in content["models"].items():
        sides = {key: side["examples_per_second"] for key, side in measured["sides"].items()}
        found += [*_scaling(model, sides), *_peers(model, sides), *_one_process(model, sides, bf16)]
    return [*found, *_memory(content["memory"])]


def _scaling(model: str, sides: Mapping[str, Rounds]) -> list[Verdict]:
    best = best_engine(sides)
    return [
        Verdict(
            model,
            f"scaling efficiency, {what}" + (" (the best engine)" if key == best else ""),
            spread(paired_ratios(sides[key], sides["local"], 0.5)),
            EFFICIENCY if key == best else None,
        )
        for key, what in (*OURS.items(), *OTHERS.items())
    ]


def _peers(model: str, sides: Mapping[str, Rounds]) -> list[Verdict]:
    best = best_engine(sides)
    return [
        Verdict(model, f"{OURS[best]} / DDP", spread(paired_ratios(sides[best], sides["ddp"])), DDP[model]),
        *(
            Verdict(
                model,
                f"{what} / raw Horovod",
                spread(paired_ratios(sides[key], sides["raw_horovod"])),
                RAW_HOROVOD if key == "horovod" else None,
            )
            for key, what in OURS.items()
        ),
        Verdict(model, "engine horovod / DDP", spread(paired_ratios(sides["horovod"], sides["ddp"]))),
        Verdict(
            model,
            "one process / pythae's BaseTrainer",
            spread(paired_ratios(sides["local"], sides["pythae"])),
            PYTHAE,
        ),
    ]


def _one_process(model: str, sides: Mapping[str, Rounds], has_bf16: bool) -> list[Verdict]:
    plain, half = (fastest(sides, *keys) for keys in (("local", "local_cl"), ("bf16", "bf16_cl")))
    formats = [f"{key} {'channels last' if key.endswith('_cl') else 'contiguous'}" for key in (half, plain)]
    rows = [
        Verdict(
            model,
            "share of a step outside forward, backward, Adam",
            spread(added_share(sides["local"], sides["bare"])),
            OVERHEAD,
            at_most=True,
        ),
        Verdict(
            model,
            "share of a step outside forward, backward, our optimizer",
            spread(added_share(sides["local"], sides["optimizer"])),
        ),
        Verdict(
            model,
            "bf16 / fp32, the faster memory format of each" if model == "conv" else "bf16 / fp32",
            spread(paired_ratios(sides[half], sides[plain])),
            BF16 if has_bf16 else None,
            note=(" / ".join(formats).replace("local", "fp32").replace("_cl", "") if model == "conv" else "")
            + ("" if has_bf16 else " no avx512_bf16 here: no target"),
        ),
    ]
    if model == "conv":
        for key, what in (("local", "fp32"), ("bf16", "bf16")):
            ratio = spread(paired_ratios(sides[f"{key}_cl"], sides[key]))
            rows.append(Verdict(model, f"{what}, channels last / contiguous", ratio))
    return rows


def added_share(whole: Rounds, part: Rounds) -> list[float | None]:
    """The share of a step's time that `whole` spends beyond `part`: 1 - t(part) / t(whole), from throughputs."""
    return [None if ratio is None else 1 - ratio for ratio in paired_ratios(whole, part)]


def _memory(memory: Mapping[str, list[dict[str, int]]]) -> list[Verdict]:
    rows = []
    for team, what in OURS.items():
        ranks = memory.get(team, [])
        growth = spread([(rank["with_data"] - rank["before_data"]) / rank["data"] for rank in ranks])
        note = f"of {ranks[0]['data'] / 2**20:.1f} MiB, a rank" if ranks else ""
        rows.append(Verdict("memory", f"{what}: growth by the data / uint8", growth, DATA_COPIES, True, note))
    for team, ranks in memory.items():
        peak = spread([rank["peak"] / 2**20 if "peak" in rank else None for rank in ranks])
        rows.append(Verdict("memory", f"peak resident, MiB a rank, team {team}", peak))
    return rows


def best_engine(sides: Mapping[str, Rounds]) -> str:
    """The engine of ours with the greater median."""
    return fastest(sides, *OURS)


def fastest(sides: Mapping[str, Rounds], *keys: str) -> str:
    """The key with the greatest median; the first of them where nothing was measured."""
    medians = {key: found.median for key in keys if key in sides and (found := spread(sides[key])) is not None}
    return max(medians, key=lambda key: medians[key]) if medians else keys[0]
