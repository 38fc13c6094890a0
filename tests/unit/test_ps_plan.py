"""Options that do not go together are refused before training, by flag."""

from typing import Any

import pytest

from hvdvae.errors import ConfigError, WorldError
from hvdvae.ps.hello import check_hello
from hvdvae.ps.ledger import quantiles
from hvdvae.ps.plan import Plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"consistency": "ssp"}, "--staleness None"),
        ({"staleness": 3}, "--staleness bounds --consistency ssp"),
        ({"consistency": "bsp", "staleness": 0}, "--staleness bounds --consistency ssp"),
        ({"backup_workers": 1}, "--backup-workers goes with --consistency bsp"),
        ({"consistency": "bsp", "backup_workers": 4}, "4 of 4 workers, expected 0 to 3"),
        ({"consistency": "bsp", "rule": "dcasgd"}, "--rule dcasgd is for pushes that come one by one"),
        ({"rule": "lars"}, "--rule is 'lars'"),
        ({"consistency": "psp"}, "--consistency is 'psp'"),
        ({"strength": 1.0}, "--dc-strength goes with --rule dcasgd"),
        ({"elasticity": 0.5}, "--elasticity is 0.5 with --rule plain"),
        ({"rule": "easgd", "elasticity": 1.5}, "expected above 0 and below 1"),
        ({"push_every": 0}, "--push-every is 0"),
        ({"push_every": 2, "fetch_every": 3}, "--fetch-every 3 is no multiple of --push-every 2"),
        ({"consistency": "bsp", "push_every": 2}, "bsp is every step"),
        ({"prefetch": True, "push_every": 2}, "--prefetch goes with a push and a pull at every step"),
        ({"prefetch": True, "rule": "dcasgd"}, "--prefetch computes with weights that are one pull older"),
        ({"rule": "easgd", "push_every": 2, "fetch_every": 4}, "--rule easgd pulls when it pushes"),
        ({"compression": "powersgd"}, "use one of fp16, bf16, int8, sign, topk"),
        ({"compression": "int8", "rule": "easgd"}, "--rule easgd pushes weights"),
        ({"compression": "int8", "compression_momentum": 0.9}, "--compression-momentum is for --compression topk"),
        ({"compression": "topk", "compression_momentum": 1.0}, "--compression-momentum is 1.0, expected 0 to below 1"),
        ({"compression": "fp16", "push_every": 2}, "the sum of --push-every 2 gradients may be beyond"),
        ({"replicas": 2}, "--replicas is 2, expected 0 or 1"),
        ({"replicas": 1}, "1 ranks serve, and --replicas 1 makes pairs of them"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Plan(**options).check(workers=4, servers=1)
    assert words in str(raised.value)


def test_workers_are_replaced_by_the_only_server() -> None:
    Plan(replace_workers=True).check(workers=2, servers=1)
    with pytest.raises(ConfigError, match="--replace-workers with 2 ranks that serve"):
        Plan(replace_workers=True).check(workers=2, servers=2)


def test_a_backup_does_not_know_what_workers_hold() -> None:
    Plan(compression="int8").check(workers=2, servers=2)
    with pytest.raises(ConfigError, match="--replicas 1"):
        Plan(compression="int8", replicas=1).check(workers=2, servers=2)


def test_backup_workers_have_one_server() -> None:
    Plan(consistency="bsp", backup_workers=1).check(workers=4, servers=1)
    Plan(consistency="bsp", backup_workers=1, replicas=1).check(workers=4, servers=2)
    with pytest.raises(ConfigError, match="--servers 2"):
        Plan(consistency="bsp", backup_workers=1).check(workers=4, servers=2)


@pytest.mark.parametrize(
    ("rank", "key", "value", "words"),
    [
        (1, "parameters", 11, "rank 1 .* parameters 11, rank 0 has 10"),
        (1, "optimizer", "SGD", "rank 1 .* optimizer SGD, rank 0 has Adam"),
        (2, "version", "0.0.1", "rank 2 .* version 0.0.1"),
        (
            2,
            "plan",
            {"consistency": "ssp", "rule": "plain"},
            "rank 2 .*'ssp'}, rank 0 has {'consistency': 'asp'}",
        ),
    ],
)
def test_ranks_that_differ_are_named(rank: int, key: str, value: Any, words: str) -> None:
    worker = {"version": "1", "plan": {"consistency": "asp", "rule": "plain"}, "parameters": 10, "optimizer": "Adam"}
    server = {"version": "1", "plan": {"consistency": "asp", "rule": "plain"}}
    hellos: list[dict[str, Any]] = [dict(worker), dict(worker), dict(server)]
    check_hello(hellos, workers=2)
    hellos[rank][key] = value
    with pytest.raises(WorldError, match=words):
        check_hello(hellos, workers=2)


def test_quantiles_of_a_histogram() -> None:
    from collections import Counter

    assert quantiles(Counter({0: 50, 1: 40, 7: 9, 30: 1})) == {"0.5": 0, "0.9": 1, "0.99": 7, "1": 30}
    assert quantiles(Counter()) == {"0.5": 0, "0.9": 0, "0.99": 0, "1": 0}
