"""The benchmark's arithmetic, on numbers whose answers are known."""

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.report import report
from benchmarks.statistics_of_rounds import Spread, paired_ratios, rotated, spread
from benchmarks.targets import Verdict, verdicts

SIDES = (
    "mpi",
    "horovod",
    "raw_horovod",
    "ddp",
    "apart",
    "local",
    "optimizer",
    "bf16",
    "local_cl",
    "bf16_cl",
    "bare",
    "pythae",
)


def content(model: str = "mlp", has_bf16: bool = True, **rates: Sequence[float | None]) -> dict[str, Any]:
    """A result file in which sides that are not named were not measured."""
    rounds = len(next(iter(rates.values())))
    missing: list[float | None] = [None] * rounds
    sides = {
        key: {
            "what": key,
            "examples_per_second": rates.get(key, missing),
            "milliseconds_per_step": rates.get(key, missing),
            "cores_of_others": missing,
        }
        for key in SIDES
    }
    return {
        "hardware": {"avx512_bf16": has_bf16, "processor": "a processor", "cores": 2, "load_average_at_start": 0.0},
        "versions": {"torch": "2"},
        "config": {"rounds": rounds, "seconds": 2.0, "batch": 128},
        "data": "some data",
        "date": "today",
        "models": {model: {"sides": sides}},
        "memory": {},
        "failures": [],
    }


def verdict(found: dict[str, Any], what: str) -> Verdict:
    return next(row for row in verdicts(found) if row.what.startswith(what))


def test_median_is_the_middle_of_what_was_measured() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([1.0, 2.0]) == Spread(1.5, 1.0, 2.0)
    assert spread([None, None]) is None


def test_ratios_compare_the_same_round() -> None:
    # Twice as fast in every round of a machine that slows down: the ratio of medians would not say so.
    assert paired_ratios([200.0, 20.0, 2.0], [100.0, 10.0, 1.0]) == [2.0, 2.0, 2.0]
    assert paired_ratios([4.0, None, 8.0], [2.0, 1.0, None], 0.5) == [1.0, None, None]
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([1.0], [1.0, 2.0])


def test_every_item_is_first_in_turn() -> None:
    assert [rotated("abc", turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert rotated("abc", 1) == ["b", "c", "a"]
    assert rotated([], 3) == []


def test_efficiency_is_of_twice_one_process_and_the_best_engine_is_judged() -> None:
    found = content(mpi=[190.0, 180.0, 196.0], horovod=[100.0, 100.0, 100.0], local=[100.0, 100.0, 100.0])
    best = verdict(found, "scaling efficiency, engine mpi (the best engine)")
    assert best.found == Spread(0.95, 0.9, 0.98)
    assert best.outcome == "reached"
    assert verdict(found, "scaling efficiency, engine horovod").outcome == ""


@pytest.mark.parametrize(("loop", "outcome"), [(98.0, "reached"), (96.0, "missed")])
def test_overhead_is_a_share_of_the_whole_step(loop: float, outcome: str) -> None:
    row = verdict(content(local=[loop], bare=[100.0]), "share of a step outside forward, backward, Adam")
    assert row.found is not None
    assert row.found.median == pytest.approx(1 - loop / 100)
    assert row.outcome == outcome


def test_the_median_decides_not_the_extremes() -> None:
    pythae = [100.0] * 3
    assert verdict(content(local=[90.0, 126.0, 130.0], pythae=pythae), "one process / pythae").outcome == "reached"
    assert verdict(content(local=[90.0, 124.0, 900.0], pythae=pythae), "one process / pythae").outcome == "missed"
    assert verdict(content(local=[90.0]), "one process / pythae").outcome == "not measured"


def test_bf16_has_a_target_only_where_the_processor_has_it() -> None:
    assert verdict(content(local=[100.0], bf16=[150.0]), "bf16 / fp32").outcome == "missed"
    assert verdict(content(has_bf16=False, local=[100.0], bf16=[150.0]), "bf16 / fp32").outcome == ""


def test_convolutions_compare_the_faster_memory_format_of_each_precision() -> None:
    row = verdict(
        content("conv", local=[100.0], local_cl=[110.0], bf16=[200.0], bf16_cl=[190.0]), "bf16 / fp32, the faster"
    )
    assert row.found is not None
    assert row.found.median == pytest.approx(200 / 110)
    assert row.note == "bf16 contiguous / fp32 channels last"


def test_memory_grows_by_the_data_in_bytes() -> None:
    found = content(local=[1.0])
    found["memory"] = {"mpi": [{"data": 100, "before_data": 50, "with_data": 155, "peak": 2**20}]}
    assert verdict(found, "engine mpi: growth").outcome == "reached"
    found["memory"]["mpi"][0]["with_data"] = 250
    assert verdict(found, "engine mpi: growth").outcome == "missed"


def test_the_report_names_what_failed() -> None:
    found = content(local=[1234.0])
    assert "failed" not in report(found)
    found["failures"] = ["mlp, PyTorch DDP: RuntimeError: no route"]
    text = report(found)
    assert "failed: mlp, PyTorch DDP: RuntimeError: no route" in text
    assert "1,234" in text
