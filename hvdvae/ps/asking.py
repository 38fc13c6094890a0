"""How a worker asks servers: one request at a time to each, sent again to the backup where a server dies."""

from collections.abc import Callable

from hvdvae.errors import RankLost, WorldError
from hvdvae.ps.channel import Channel, PeersDied
from hvdvae.ps.protocol import Answer, Header


class Servers:
    """All servers, by the number of their shard, and who holds it now."""

    def __init__(self, channel: Channel, holders: list[list[int]]) -> None:
        """`holders`: of each shard, the ranks of server and backup."""
        self._channel = channel
        self._holders = [list(ranks) for ranks in holders]
        """Those that live; who serves now is the first."""
        self._send_again: dict[int, Callable[[int], None]] = {}
        self.takeovers = 0
        """How often a backup took the place of a server that died."""

    def ask(self, number: int, send: Callable[[int], None]) -> None:
        """Send a server a request; `send` takes its rank, and may be called again, with its backup's."""
        self._send_again[number] = send
        send(self._holders[number][0])

    def answer(self, number: int, sequence: int, take: Callable[[int, Header], None]) -> Header:
        """The header of the answer to request `sequence`; `take` takes rank and header, and receives what follows.

        Blocks. `take` may be called again, where the server dies in the midst of it. Raises RankLost where a server
        has died and has no backup left.
        """
        while True:
            server = self._holders[number][0]
            try:
                _, header = self._channel.receive(server)
                if header[Answer.SEQUENCE] != sequence:
                    raise WorldError(
                        f"parameter server {number} (rank {server}) answered request {header[Answer.SEQUENCE]:.0f}, "
                        f"expected an answer to {sequence}: a defect of hvdvae; continue with --resume, and report it"
                    )
                take(server, header)
                self._channel.flush(server)
                return header
            except PeersDied:
                if server in self._channel.dead:
                    self._turn_to_backup(number)

    def _turn_to_backup(self, number: int) -> None:
        lost = self._holders[number].pop(0)
        if not self._holders[number]:
            raise RankLost(
                f"parameter server {number} (rank {lost}) has died, and it has no backup (left; see --replicas): "
                "continue from the last checkpoint with --resume"
            )
        self.takeovers += 1
        self._send_again[number](self._holders[number][0])
