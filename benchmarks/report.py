"""The tables that people read."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.statistics_of_rounds import Spread, spread
from benchmarks.targets import Verdict, verdicts

BUSY = 0.1
"""Cores that other processes may use before the report warns."""


def report(content: Mapping[str, Any]) -> str:
    """All of a result file as text: machine, throughput of each side, ratios with targets, what failed."""
    return "\n".join([*_machine(content), *_throughput(content), *_verdicts(verdicts(content)), *_failed(content)])


def _machine(content: Mapping[str, Any]) -> Iterator[str]:
    hardware, config = content["hardware"], content["config"]
    load = f"load {hardware['load_average_at_start']:.1f} at the start"
    yield f"{hardware['processor']}, {hardware['cores']} cores, {load}"
    yield ", ".join(f"{name} {found}" for name, found in content["versions"].items())
    yield from _others(content)
    yield f"{content['data']}; batch {config['batch']} a rank, one thread a rank, {content['date']}"
    yield f"{config['rounds']} rounds of {config['seconds']:g} s a side: median [least .. greatest]"


def _others(content: Mapping[str, Any]) -> Iterator[str]:
    sides = [side for measured in content["models"].values() for side in measured["sides"].values()]
    cores = spread([value for side in sides for value in side["cores_of_others"]])
    if cores is not None:
        warning = ": the numbers below are not to be trusted" if cores.median > BUSY else ""
        yield f"other processes used {cores.median:.2f} [{cores.low:.2f} .. {cores.high:.2f}] cores meanwhile{warning}"


def _throughput(content: Mapping[str, Any]) -> Iterator[str]:
    for model, measured in content["models"].items():
        yield ""
        yield f"{model + ', examples/s':<66}{'median':>10}{'ms a step':>12}"
        for side in measured["sides"].values():
            rates, times = (spread(side[key]) for key in ("examples_per_second", "milliseconds_per_step"))
            if rates is None or times is None:
                yield f"  {side['what']:<64}not measured"
            else:
                middle = f"{rates.median:>10,.0f}{times.median:>12.2f}"
                yield f"  {side['what']:<64}{middle}   {_range(rates, ',.0f')}"


def _verdicts(rows: list[Verdict]) -> Iterator[str]:
    yield ""
    yield f"{'ratios, paired by round':<66}{'median':>10}{'target':>12}"
    for row in rows:
        style = ".0f" if "MiB" in row.what else ".3f"
        median = format(row.found.median, style) if row.found else "-"
        target = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}"
        where = _range(row.found, style) if row.found else ""
        name = f"  {row.model + ': ' + row.what:<64}"
        yield f"{name}{median:>10}{target:>12}   {row.outcome:<13}{where} {row.note}".rstrip()


def _failed(content: Mapping[str, Any]) -> Iterator[str]:
    for line in content["failures"]:
        yield f"failed: {line}"


def _range(found: Spread, style: str) -> str:
    return f"[{format(found.low, style)} .. {format(found.high, style)}]"
