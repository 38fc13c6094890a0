"""Which of the launcher's ranks are parameter servers: spread over the hosts, the last ranks of each. Pure."""

from collections.abc import Sequence


def order_of_roles(hosts: Sequence[str], servers: int) -> list[int]:
    """The launcher's ranks in the order of ours: those that train first, then `servers` that serve.

    `hosts`: of each of the launcher's ranks. Servers are dealt to the hosts in turn, the last host first, so that their
    traffic does not meet in one network card; the second half, which may be backups, begins one host further, so that
    a backup is on another host than what it backs up, where there is one. Rank 0 always trains: it writes the files.
    """
    names = sorted(set(hosts), key=lambda name: -max(rank for rank, host in enumerate(hosts) if host == name))
    left = {name: [rank for rank, host in enumerate(hosts) if host == name and rank] for name in names}
    serving: list[int] = []
    for number in range(servers):
        half = (servers + 1) // 2
        first = number if number < half else number - half + 1
        turn = [names[(first + step) % len(names)] for step in range(len(names))]
        serving.append(left[next(name for name in turn if left[name])].pop())
    # On one host they keep the launcher's order.
    serving = sorted(serving) if len(names) == 1 else serving
    return [rank for rank in range(len(hosts)) if rank not in serving] + serving


def place_on_host(hosts: Sequence[str], order: Sequence[int], servers: int) -> list[tuple[int, int]]:
    """For each of our ranks, its place among those of its role on its host, and their number."""
    first_server = len(order) - servers
    kinds = [(hosts[rank], place >= first_server) for place, rank in enumerate(order)]
    return [(kinds[:place].count(kind), kinds.count(kind)) for place, kind in enumerate(kinds)]
