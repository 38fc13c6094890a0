"""Servers are spread over the hosts, off rank 0, and a backup is on another host than what it backs up."""

import pytest

from hvdvae.world.roles import order_of_roles, place_on_host

A, B, C = ["a"], ["b"], ["c"]


@pytest.mark.parametrize(
    ("hosts", "servers", "serving"),
    [
        (4 * A, 0, []),
        (4 * A, 1, [3]),
        (4 * A, 2, [2, 3]),
        (2 * A + 2 * B, 1, [3]),
        (2 * A + 2 * B, 2, [3, 1]),
        (3 * A + 3 * B, 4, [5, 2, 1, 4]),
        (A + B + C, 2, [2, 1]),
        (A + 4 * B, 4, [4, 3, 2, 1]),
        (A + B + A + B, 2, [3, 2]),
        (2 * A + 2 * B, 3, [3, 1, 2]),
    ],
)
def test_who_serves(hosts: list[str], servers: int, serving: list[int]) -> None:
    order = order_of_roles(hosts, servers)
    assert order[len(hosts) - servers :] == serving
    assert order[: len(hosts) - servers] == [rank for rank in range(len(hosts)) if rank not in serving]


@pytest.mark.parametrize("hosts", [3 * A + 3 * B, 4 * A + 4 * B + 4 * C])
def test_a_backup_is_elsewhere(hosts: list[str]) -> None:
    for servers in (1, 2):
        serving = order_of_roles(hosts, 2 * servers)[-2 * servers :]
        for primary, backup in zip(serving[:servers], serving[servers:], strict=True):
            assert hosts[primary] != hosts[backup]


def test_gpus_are_counted_among_those_that_train() -> None:
    hosts = 3 * A + 3 * B
    order = order_of_roles(hosts, 2)
    assert order == [0, 1, 3, 4, 5, 2]
    assert place_on_host(hosts, order, 2) == [(0, 2), (1, 2), (0, 2), (1, 2), (0, 1), (0, 1)]
