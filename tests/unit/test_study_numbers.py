"""The numbers of a cell, and what may be said of several, on cells whose answers are known."""

from typing import Any

import numpy as np
import pytest

from benchmarks.study.findings import LEAST_SEEDS, apart, conditions, ranking, sentence, sooner
from benchmarks.study.numbers import FIRST_STEPS, crossing, height_at, numbers
from benchmarks.study.stopwatch import COLUMNS, CPU, DATA, EXCHANGE, PASSES, QUEUE, UPDATE
from benchmarks.study.study_file import Study, parse
from benchmarks.study.table import COLUMNS as TABLE_COLUMNS
from benchmarks.study.table import lines

STUDY = """\
title: t
world_sizes: [2]
seeds: [0, 1, 2]
target: {TARGET}
budget: {epochs: 3, seconds: 60}
contenders:
  single: {strategy: local}
  allreduce: {strategy: allreduce}
  asp: {strategy: ps}
  bsp: {strategy: ps, consistency: bsp}
scenarios:
  uniform:
"""


def study(target: str = "nats: -10") -> Study:
    return parse(STUDY.replace("TARGET", target), "s.yaml")


def points(*elbos: float | None, every: float = 1.0) -> list[dict[str, Any]]:
    return [{"examples": 100 * n, "seconds": every * n, "elbo": elbo} for n, elbo in enumerate(elbos)]


def cell(contender: str, seed: int, curve: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    size = 1 if contender == "single" else 2
    return {
        "contender": contender,
        "size": size,
        "scenario": "uniform",
        "seed": seed,
        "failed": None,
        "points": curve,
        "nll": 9.0,
        "epoch_examples": 100,
        "examples_per_second": 100.0 * size,
        "latency_seconds": {"p50": 0.01, "p95": 0.02, "p99": 0.03},
        "throughput_over_latency": 1.0,
        "split": [{"compute": 1.0, "core": 0.0, "data": 0.0, "communicate": 0.0, "wait": 0.0}] * size,
        "staleness": {"0": 3, "2": 1},
        "dropped_pushes": 0,
        "payload_bytes_per_step": None,
        "sent_bytes_per_step": 0.0,
        "cpu_cores": [1.0] * size,
        "peak_rss_bytes": [1e8] * size,
        **changes,
    }


def three(contender: str, *every: float) -> list[dict[str, Any]]:
    """Cells that reach -10 after 2 x `every` seconds."""
    return [cell(contender, seed, points(-30, -20, -10, -5, every=each)) for seed, each in enumerate(every)]


def test_the_target_is_crossed_between_two_looks() -> None:
    curve = points(-30, -20, -10, -5)
    assert crossing(curve, -20, "seconds") == 1
    assert crossing(curve, -15, "seconds") == 1.5
    assert crossing(curve, -15, "examples") == 150
    assert crossing(curve, -4, "seconds") is None
    assert crossing(curve, -40, "seconds") == 0, "it was there at once"
    assert crossing([], -4, "seconds") is None


def test_a_look_that_was_not_finite_is_below_every_target() -> None:
    assert crossing(points(-30, None, -10), -20, "seconds") == 2
    assert crossing(points(None, None), -20, "seconds") is None


def test_the_bound_may_be_the_nll() -> None:
    curve = [{"examples": 100 * n, "seconds": n, "elbo": -99.0, "nll": nll} for n, nll in enumerate((30, 20, None, 10))]
    assert crossing(curve, -25, "seconds", "nll") == 0.5
    assert crossing(curve, -10, "seconds", "nll") == 3
    assert height_at(curve, 50, "nll") == -25
    cells = [cell("asp", seed, curve) for seed in range(3)]
    condition = conditions(study("bound: nll, nats: 20"), cells)[0]
    assert condition.rows[0].seconds == [1.0] * 3
    assert "an NLL of 20.00 nats" in sentence(condition)


def test_what_was_skipped_has_not_failed() -> None:
    cells = [cell("asp", seed, [], failed="skipped: needs root") for seed in range(3)]
    assert "Skipped: asp" in sentence(conditions(study(), cells)[0])


def test_the_first_crossing_counts() -> None:
    assert crossing(points(-30, -10, -30, -10), -20, "seconds") == 0.5


def test_the_elbo_after_so_many_examples() -> None:
    assert height_at(points(-30, -20, -10), 150) == -15
    assert height_at(points(-30, -20, -10), 200) == -10
    assert height_at(points(-30, -20, -10), 201) is None
    assert height_at(points(-30, None, -10), 150) is None


def steps(count: int, *, compute: float, exchange: float, queue: float = 0.0) -> np.ndarray[Any, Any]:
    """All alike: a second of data, and an update that takes no time."""
    found = np.zeros((count, COLUMNS))
    found[:, DATA] = 1.0
    found[:, PASSES], found[:, PASSES + CPU], found[:, PASSES + QUEUE] = compute + queue, compute, queue
    found[:, EXCHANGE], found[:, UPDATE] = exchange, 0.0
    return found


ORDER = {"hook": "none", "size": 2, "config": {"compression": "none", "reduce_op": "average"}}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "batch": 10,
        "parameters": 1000,
        "counted": {},
        "seconds": 10.0,
        "cpu_seconds": 5.0,
        "peak_rss_bytes": 100,
        "sent_bytes": 0,
        "network": 1,
        **changes,
    }


def test_who_is_waited_for_waits_for_nobody() -> None:
    fast, slow = steps(100, compute=2.0, exchange=5.0), steps(100, compute=6.0, exchange=1.0)
    found = numbers(ORDER, [(record(), fast), (record(), slow)], [])
    assert found["split"][0] == pytest.approx(
        {"compute": 2 / 8, "core": 0, "data": 1 / 8, "communicate": 1 / 8, "wait": 4 / 8}
    )
    assert found["split"][1] == pytest.approx(
        {"compute": 6 / 8, "core": 0, "data": 1 / 8, "communicate": 1 / 8, "wait": 0}
    )
    assert found["examples_per_second"] == pytest.approx(2 * 10 / 8)
    assert found["latency_seconds"] == pytest.approx({"p50": 8, "p95": 8, "p99": 8})


def test_a_core_that_others_had_is_not_compute() -> None:
    found = numbers(ORDER, [(record(), steps(100, compute=2.0, exchange=0.0, queue=1.0))], [])
    assert found["split"][0] == pytest.approx({"compute": 0.5, "core": 0.25, "data": 0.25, "communicate": 0, "wait": 0})


def test_a_pass_that_was_blocked_exchanges() -> None:
    """As DDP's backward pass does."""
    one = steps(100, compute=2.0, exchange=0.0)
    one[:, PASSES] += 1.0
    found = numbers(ORDER, [(record(), one)], [])
    assert found["split"][0]["communicate"] == pytest.approx(0.25)


def test_under_servers_waiting_is_what_pushes_spend_there() -> None:
    counted = {"queue_seconds_mean": 1.0, "bytes_pushed": 3000, "bytes_pulled": 1000, "staleness_histogram": {"1": 200}}
    ranks = [(record(counted=counted), steps(100, compute=2.0, exchange=5.0))] * 2
    found = numbers(ORDER, ranks, [record()])
    assert found["split"][0]["wait"] == pytest.approx(1 / 8)
    assert found["split"][0]["communicate"] == pytest.approx(4 / 8)
    assert found["payload_bytes_per_step"] == 20
    assert found["staleness"] == {"1": 200}
    assert len(found["cpu_cores"]) == 3, "the server's too"


def test_the_first_steps_do_not_count() -> None:
    measured = steps(100, compute=2.0, exchange=0.0)
    measured[:FIRST_STEPS, PASSES] = 1000.0
    found = numbers(ORDER, [(record(), measured)], [])
    assert found["latency_seconds"]["p99"] == pytest.approx(3.0)


def test_bytes_of_a_ring_and_of_an_interface_that_all_see() -> None:
    ranks = [(record(sent_bytes=4000), steps(100, compute=1, exchange=1))] * 2
    found = numbers(ORDER, ranks, [])
    assert found["payload_bytes_per_step"] == 4000
    assert found["sent_bytes_per_step"] == 4000 / 200, "one host, seen by two ranks"
    apart_ = [(record(sent_bytes=4000, network=n), steps(100, compute=1, exchange=1)) for n in range(2)]
    assert numbers(ORDER, apart_, [])["sent_bytes_per_step"] == 8000 / 200
    half = numbers({**ORDER, "hook": "fp16"}, ranks, [])["payload_bytes_per_step"]
    assert half == 2000
    assert numbers({**ORDER, "hook": "powersgd"}, ranks, [])["payload_bytes_per_step"] is None


def test_spreads_that_overlap_are_no_difference() -> None:
    assert apart([1, 2, 3], [4, 5, 6])
    assert not apart([1, 2, 4], [4, 5, 6])
    assert not apart([1, 2], [4, 5, 6]), "two seeds are too few"
    assert not apart([1, 2, None], [4, 5, 6])
    assert not apart([None], [4, 5, 6])


def test_the_winner_is_named_with_its_lead() -> None:
    cells = three("allreduce", 10, 11, 12) + three("asp", 5, 5.5, 6) + three("bsp", 20, 20, 21)
    condition = conditions(study(), cells)[0]
    assert [row.contender for row in ranking(condition)] == ["asp", "allreduce", "bsp"]
    said = sentence(condition)
    assert said.startswith("asp reaches -10.00 nats first, after 11.0 [10.0, 12.0] s")
    assert "2.00 [2.00, 2.00] times sooner than allreduce" in said


def test_the_next_and_the_next_that_steps_together() -> None:
    cells = three("allreduce", 10, 11, 12) + three("asp", 1, 1, 1) + three("bsp", 5, 5, 5)
    said = sentence(conditions(study(), cells)[0])
    assert "than bsp" in said
    assert "than allreduce" in said


def test_no_claim_where_spreads_overlap() -> None:
    cells = three("allreduce", 10, 11, 12) + three("asp", 9, 10, 11) + three("bsp", 20, 20, 21)
    said = sentence(conditions(study(), cells)[0])
    assert said.startswith("No difference seen between asp, allreduce:")
    assert "times sooner than bsp" in said


def test_no_claim_from_few_seeds() -> None:
    said = sentence(conditions(study(), three("allreduce", 10) + three("asp", 1))[0])
    assert "nothing is claimed" in said
    assert f"at least {LEAST_SEEDS}" in said


def test_who_failed_or_did_not_arrive_is_named_and_not_ranked() -> None:
    dead = [cell("bsp", seed, [], failed="ended with status 1") for seed in range(3)]
    late = [cell("asp", seed, points(-30, -20, -10 if seed else -15)) for seed in range(3)]
    condition = conditions(study(), three("allreduce", 10, 10, 10) + late + dead)[0]
    assert [row.contender for row in ranking(condition)] == ["allreduce"]
    said = sentence(condition)
    assert "Not in every seed: asp." in said
    assert "Failed: bsp." in said


def test_nobody_arrives() -> None:
    cells = [cell("asp", seed, points(-30, -20)) for seed in range(3)]
    assert sentence(conditions(study(), cells)[0]).startswith("Nobody reached -10.00 nats")


def test_the_target_may_be_a_contenders() -> None:
    wanted = study("contender: allreduce, epochs: 1.5")
    cells = [cell("allreduce", seed, points(-30, -20, -10 - seed)) for seed in range(3)]
    assert conditions(wanted, cells)[0].target == pytest.approx(-15.5), "the median over seeds"
    failed = [cell("allreduce", 0, [], failed="x"), *three("asp", 1, 1, 1)]
    assert "nothing can be said" in sentence(conditions(wanted, failed)[0])


def test_ratios_are_of_the_same_seed() -> None:
    rows = {
        row.contender: row for row in conditions(study(), three("allreduce", 2, 4, 8) + three("asp", 1, 2, 4))[0].rows
    }
    assert sooner(rows["asp"], rows["allreduce"]) == (2, 2, 2)


def test_the_table_has_every_contender_and_the_efficiency_of_scaling() -> None:
    cells = three("allreduce", 1, 1, 1) + three("single", 2, 2, 2)
    table = dict(lines(conditions(study(), cells)[0]))
    assert list(table) == ["single", "allreduce"]
    assert len(table["allreduce"]) == 2 + len(TABLE_COLUMNS) + 1
    assert table["allreduce"][-1].key == 1.0, "twice the throughput by two"
    assert table["single"][-1].text == "-"
    assert table["allreduce"][0].text == "2.00"
