"""Collectives over Horovod where there is no MPI: `horovodrun --gloo`.

Every operation is named and numbered: Horovod matches operations by name, and unnamed ones deadlock once ranks have
called different numbers of them.
"""

import horovod.torch as hvd
import torch
from horovod.common.elastic import notification_manager

from hvdvae.world.collectives import Array, unequal_lengths


class HorovodCollectives:
    """The contract of collectives.Collectives over Horovod's Gloo controller."""

    def __init__(self) -> None:
        """Initialize Horovod. Blocks until all ranks have."""
        hvd.init()
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self._calls = 0

    def _name(self, operation: str) -> str:
        self._calls += 1
        return f"hvdvae.world.{operation}.{self._calls}"

    def sum_(self, array: Array) -> None:
        """Sum over ranks, in place."""
        hvd.allreduce_(torch.from_numpy(array), name=self._name("sum"), op=hvd.Sum)

    def max_(self, array: Array) -> None:
        """Maximum over ranks, in place."""
        hvd.allreduce_(torch.from_numpy(array), name=self._name("max"), op=hvd.Max)

    def broadcast_(self, array: Array, root: int) -> None:
        """Overwrite with root's."""
        hvd.broadcast_(torch.from_numpy(array), root, name=self._name("broadcast"))

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Allgather of lengths, then of bytes."""
        lengths = hvd.allgather(torch.tensor([len(data)]), name=self._name("lengths")).tolist()
        # Horovod refuses a tensor of no elements on some ranks: one byte of padding each.
        padded = torch.frombuffer(bytearray(data + b"\0"), dtype=torch.uint8)
        everything = hvd.allgather(padded, name=self._name("bytes")).numpy()
        return [everything[part].tobytes()[:-1] for part in unequal_lengths([n + 1 for n in lengths])]

    def gather_rows(self, row: Array, rows: Array) -> None:
        """Allgather."""
        gathered = hvd.allgather(torch.from_numpy(row), name=self._name("rows"))
        torch.from_numpy(rows).copy_(gathered.view(rows.shape))

    def exchange_rows(self, rows: Array, found: Array) -> None:
        """Alltoall."""
        received = hvd.alltoall(torch.from_numpy(rows), name=self._name("exchange"))
        torch.from_numpy(found).copy_(received.view(found.shape))

    def barrier(self) -> None:
        """Return once every rank has called."""
        hvd.barrier()

    def revoke(self) -> None:
        """Gloo ends every wait by itself when a rank dies."""

    def shrink(self) -> None:
        """Meet anew with those that horovodrun now counts, new ones too. Blocks until it has said who they are."""
        hvd.shutdown()
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        # New ranks begin to count, too.
        self._calls = 0


class HostChanges:
    """Hears from horovodrun that hosts were added or taken away."""

    def __init__(self) -> None:
        """Listen, in a thread of Horovod's."""
        self.heard = False
        notification_manager.init()
        notification_manager.register_listener(self)

    def on_hosts_updated(self, timestamp: float, result: object) -> None:
        """Called by Horovod."""
        self.heard = True
