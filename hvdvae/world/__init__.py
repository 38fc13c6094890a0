"""Who this process is, and how it speaks to the others: the one object that asks MPI or the environment.

    world = World.create()          # under mpirun, srun, horovodrun, or alone
    world.rank, world.size, world.local_rank, world.host, world.device, world.launcher

With servers (`World.create(servers=1)`) the last ranks are parameter servers, the others trainers; `rank` and `size`
are among those of one's own role, and so are all sums and barriers. `everyone` is all of them. Over several hosts the
ranks are numbered anew, so that servers are on all hosts (roles.py).

With no launcher the world has size 1 and imports neither MPI nor Horovod. Horovod is started by the first strategy that
needs it (`world.horovod()`), because its background thread takes cycles from the core that computes.
"""

import atexit
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Literal

import torch

from hvdvae.deadline import Group, Watchdog
from hvdvae.errors import ConfigError, RankLost, WorldError
from hvdvae.launcher import Launch, Launcher, detect, leave_launch, survives_deaths
from hvdvae.world import deaths, settings
from hvdvae.world.child import forget_rank, note_place, note_rank, world_of_child
from hvdvae.world.collectives import Alone, Collectives
from hvdvae.world.horovod import start_horovod
from hvdvae.world.join import check_servers, choose_device
from hvdvae.world.members import Change, Members
from hvdvae.world.start import come_to_those, meet_all, replace_worker

leave_launch(os.environ)
settings.prefer(os.environ)

DEFAULT_DEADLINE = 300.0
"""Seconds that a rank waits for others before it ends the job."""


class World:
    """This process among all. Make one a process, with `World.create` or `World.alone`."""

    _served: "ClassVar[World | None]" = None
    """The last whose servers have begun to serve a model."""

    def __init__(
        self,
        launch: Launch,
        carrier: Collectives,
        device: torch.device,
        watchdog: Watchdog,
        comm: Any = None,
        everyone: Any = None,
        servers: int = 0,
    ) -> None:
        """Take the parts; `create` and `alone` make them.

        `comm`: the MPI communicator of this process's role, None without MPI. `everyone`: that of all ranks, the
        `servers` last of which are parameter servers.
        """
        self.rank = carrier.rank
        self.size = carrier.size
        self.local_rank = launch.local_rank
        self.local_size = launch.local_size
        self.host = socket.gethostname()
        self.launcher: Launcher = launch.launcher
        self.is_rank = launch.parent is None
        """Whether this process takes part in what ranks do together: not where a rank has started it (child.py)."""
        self.joins = launch.joins
        """Whether this trainer takes the place of one that died: it meets no other trainer, only the server."""
        self.device = device
        self.watchdog = watchdog
        self.comm = comm
        self.everyone: Any = everyone
        self.servers = servers
        serves = bool(servers) and self.everyone.rank >= self.everyone.size - servers
        self.role: Literal["trainer", "server"] = "server" if serves else "trainer"
        self._closing: list[Callable[[], None]] = []
        self.carrier = carrier
        self.revocable: list[Any] = []
        """Communicators of this rank besides the carrier's, in which others may wait."""
        self.kin: tuple[World, ...] = (self,)
        """Worlds of some of the same ranks: whoever leaves one, since a rank has died, leaves all."""
        self.members = Members(f"rank {carrier.rank} ({self.host})")
        """Who takes part, and who does in the place of those that die."""
        self.starting = False
        """Whether this is a command that has not begun to train: nothing can be lost by a death yet."""
        self._launch = launch
        self._horovod: Any = None
        first = self.everyone.size - servers if serves else 0
        self.group: Group | None = None
        """These ranks, for the watchdog; None where nobody can tell, as after ranks have died or come."""
        if self.size > 1:
            self.group = Group(self.role, tuple(range(first, first + self.size)))
        self._is_closed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "World":
        """Itself: a copy of a model is among the same ranks."""
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Pickled as None: whoever loads a model is among others."""
        return type(None), ()

    @classmethod
    def create(cls, *, device: str = "auto", deadline: float = DEFAULT_DEADLINE, servers: int = 0) -> "World":
        """Join the launcher's ranks. Blocks; every rank must call it.

        `device`: auto (a GPU by local rank where there is one), cpu, or a torch device. `deadline`: seconds.
        `servers`: how many ranks, the last ones, are parameter servers or their backups. Raises WorldError if the
        launcher's count and MPI's disagree or the library that the launcher needs is missing, ConfigError if too few
        ranks were started. In a process that a rank has started it joins nobody and does not block (child.py).
        """
        launch = detect(os.environ)
        if launch.parent is not None:
            return world_of_child(cls, launch, launch.parent, device)
        if cls._served is not None:
            cls._served.check_serves_nobody()
        if launch.launcher == "none" or (launch.launcher == "srun" and launch.size == 1):
            # One task of Slurm's needs no MPI, and one that was built without Slurm's PMI would end the process.
            check_servers(servers, launch)
            return cls.alone(device=device)
        if launch.joins:
            world = replace_worker(cls, launch, device, deadline)
        elif launch.enters:
            world = come_to_those(cls, launch, device, deadline)
        else:
            world = meet_all(cls, launch, device, deadline, servers)
        note_rank(world)
        return world

    @classmethod
    def alone(cls, *, device: str = "auto") -> "World":
        """The world of size 1, whatever the environment says."""
        carrier = Alone()
        watchdog = Watchdog(rank=0, size=1, seconds=DEFAULT_DEADLINE)
        return cls(Launch(launcher="none"), carrier, choose_device(device, 0), watchdog)

    def part(self, number: int) -> "World":
        """The World of those trainers that give the same number. Blocks; every trainer must call it.

        Raises WorldError without MPI, whose communicators it needs.
        """
        if self.size == 1:
            return World.alone(device=str(self.device))
        if self.comm is None:
            raise WorldError("parts of the ranks need MPI: start with mpirun, srun or horovodrun --mpi")
        from hvdvae.world.mpi import MpiCollectives

        with self.watchdog.waiting("split of the ranks"):
            carrier = MpiCollectives(self.comm.Split(number, self.rank), is_ours=True)
        part = World(self._launch, carrier, self.device, self.watchdog, carrier.comm)
        places = carrier.comm.Get_group().Translate_ranks([*range(carrier.size)], self.comm.Get_group())
        part.group = self.group_of(places)
        return part

    def group_of(self, ranks: Sequence[int]) -> Group | None:
        """Some of these ranks, for the watchdog. Local."""
        if self.group is None or len(ranks) == self.size:
            return self.group
        whole = [self.group.ranks[rank] for rank in ranks]
        return Group(",".join(map(str, whole)), tuple(whole)) if len(whole) > 1 else None

    def begin_to_be_served(self) -> None:
        """The parameter servers hold a model of this rank's from now on, until `close`. Local."""
        World._served = self

    def check_serves_nobody(self) -> None:
        """Raises ConfigError where the servers hold a model already: they hear of no other. Local."""
        if World._served is self and not self._is_closed:
            raise ConfigError(
                "the parameter servers of this job serve one model, and hold one already: train several models, each "
                "with an optimizer of its own (as a GAN), with strategy='allreduce' or 'sharded', or give one "
                "optimizer the parameters of all (nn.ModuleList([first, second]) as the model); another World after "
                "close()"
            )

    @property
    def hosts_changed(self) -> bool:
        """Whether an elastic horovodrun has other hosts now: time to `recover`. Local; ranks hear it one by one."""
        return self.members.changes is not None and self.members.changes.heard

    @property
    def is_first(self) -> bool:
        """Whether this is the trainers' rank 0, which writes files and speaks to the user."""
        return self.rank == 0 and self.role == "trainer"

    @property
    def survives_deaths(self) -> bool:
        """Whether the others can go on when a rank dies (mpirun --with-ft ulfm, or an elastic horovodrun)."""
        return survives_deaths(os.environ) or self.members.changes is not None

    def sum_(self, tensor: torch.Tensor, what: str = "sum") -> torch.Tensor:
        """Sum over ranks in place, the same bits on all. Blocks; every rank must call. Returns the tensor."""
        return self._on_host(tensor, what, self.carrier.sum_)

    def max_(self, tensor: torch.Tensor, what: str = "max") -> torch.Tensor:
        """Elementwise maximum over ranks, in place. Blocks; every rank must call. Returns the tensor."""
        return self._on_host(tensor, what, self.carrier.max_)

    def broadcast_(self, tensor: torch.Tensor, root: int = 0, what: str = "broadcast") -> torch.Tensor:
        """Overwrite with root's values. Blocks; every rank must call. Returns the tensor."""
        return self._on_host(tensor, what, lambda array: self.carrier.broadcast_(array, root))

    def gather_objects(self, record: Any, what: str = "gather") -> list[Any]:
        """Every rank's JSON-able record, in rank order, on all ranks. Blocks; every rank must call."""
        found = self.gather_bytes(json.dumps(record).encode(), what)
        try:
            return [json.loads(data) for data in found]
        except ValueError as error:
            if not self.survives_deaths:
                raise
            # Open MPI's gather has been seen to return without an error, and without what a rank that died had to say.
            deaths.end_waits(self)
            raise deaths.lost(self, what) from error

    def gather_from_everyone(self, record: Any, what: str) -> list[Any]:
        """As `gather_objects`, of trainers and servers, in the order of `everyone`. Needs MPI; all must call it."""
        from hvdvae.world.mpi import gather_json

        with self.waiting(what, patient=True):
            return gather_json(self.everyone, record)

    def gather_bytes(self, data: bytes, what: str = "gather") -> list[bytes]:
        """Every rank's bytes, in rank order, on all ranks. Blocks; every rank must call."""
        with self.waiting(what):
            return self.carrier.gather_bytes(data)

    def gather_rows(self, row: torch.Tensor, rows: torch.Tensor, what: str = "gather") -> torch.Tensor:
        """Every rank's row (n,) to `rows` (size, n), both on the host. Blocks; every rank must call it.

        Rows are equally long on all ranks. Returns `rows`.
        """
        with self.waiting(what):
            self.carrier.gather_rows(row.numpy(), rows.numpy())
        return rows

    def exchange_rows(self, rows: torch.Tensor, found: torch.Tensor, what: str = "exchange") -> torch.Tensor:
        """Row j of every rank's `rows` (size, n) to rank j's `found` (size, n), on the host. Blocks; all must call it.

        Rows are equally long on all ranks. Returns `found`.
        """
        with self.waiting(what):
            self.carrier.exchange_rows(rows.numpy(), found.numpy())
        return found

    def barrier(self, what: str = "barrier", *, patient: bool = False) -> None:
        """Return once every rank has called. `patient`: however long one takes, while it lives (see Watchdog)."""
        with self.waiting(what, patient=patient):
            self.carrier.barrier()

    def shares_memory(self, bytes_each: int) -> bool:
        """Whether all ranks can see memory of so many bytes a rank. Blocks; every rank must call it.

        Not with one rank, without MPI, over several hosts, on a GPU, or where shared memory is too small.
        """
        if self.size == 1 or self.comm is None or self.device.type != "cpu":
            return False
        from hvdvae.world.shared_memory import fits

        with self.waiting("shared memory"):
            return fits(self.comm, bytes_each)

    def shared_vectors(self, like: torch.Tensor) -> Any:
        """Vectors like this one in memory that all ranks see (SharedVectors), or None where they do not share it.

        Blocks; every rank must call it.
        """
        if not self.shares_memory(like.nbytes):
            return None
        from hvdvae.world.shared_memory import SharedVectors

        with self.waiting("shared memory"):
            shared = SharedVectors(self.comm, like)
        self.revocable.append(shared.comm)
        return shared

    def shared_vector(self, like: torch.Tensor) -> torch.Tensor:
        """One vector like this one (P,), zeroed, that all ranks see. Blocks; every rank must call it.

        Raises WorldError where there is no room for it.
        """
        from hvdvae.world.shared_memory import fits, one_vector

        if not like.numel():
            return torch.zeros_like(like)
        with self.waiting("shared memory"):
            if not fits(self.comm, -(-like.nbytes // self.size)):
                raise WorldError(
                    f"no room in /dev/shm for {like.nbytes:,} bytes of the optimizer's state, which there was when "
                    "training began: free some, or use --engine horovod"
                )
            return one_vector(self.comm, like)

    def horovod(self) -> Any:
        """Horovod's torch module, started on the trainers' communicator. Blocks; every rank must call the first time.

        Raises WorldError where Horovod is not installed or was built for another MPI or torch.
        """
        if not self.is_rank:
            self.carrier.barrier()  # Says why this cannot be.
        if self._horovod is None:
            with self.waiting("horovod init"):
                self._horovod = start_horovod(self.comm, self.size, self.watchdog.seconds)
        return self._horovod

    def on_close(self, action: Callable[[], None]) -> None:
        """Have something done before this process leaves, by `close` or at the program's end."""
        if not self._closing:
            atexit.register(self._finish)
        self._closing.append(action)

    def _finish(self) -> None:
        while self._closing:
            self._closing.pop()()

    def shrink(self) -> None:
        """Go on without the ranks that have died: `rank` and `size` change. Every living rank of the role must call."""
        with self.watchdog.waiting("agreement on who is left"):
            self.carrier.shrink()
        self.take(self.carrier)

    def recover(self, *, trains: bool = True) -> Change:
        """After RankLost, or `hosts_changed`: go on with those that live, and with those that were added.

        Horovod is stopped; `horovod` starts it anew. `trains`: whether this rank has been training. Blocks; every
        living rank must call it.
        """
        self.stop_horovod()
        return self.members.recover(self, trains=trains)

    def stop_horovod(self) -> None:
        """End Horovod here; what others still do with it fails. `horovod` starts it anew. Blocks until it has ended."""
        if self._horovod is not None and self.comm is not None:
            with self.watchdog.waiting("end of Horovod"):
                self._horovod.shutdown()
        self._horovod = None

    def take(self, carrier: Collectives) -> None:
        """Speak to the ranks of this carrier from now on. Local."""
        self.carrier = carrier
        self.comm = getattr(carrier, "comm", None)
        self.rank, self.size = carrier.rank, carrier.size
        self.revocable.clear()
        self.group = None
        note_place(self)

    def leave_to_rank(self, carrier: Collectives) -> None:
        """In a forked child: what ranks do together is done by `carrier` from now on, and nothing at exit. Local."""
        self.carrier, self.comm, self._horovod, self.is_rank = carrier, None, None, False
        if self._closing:
            atexit.unregister(self._finish)
            self._closing.clear()

    def enter(self) -> None:
        """A rank that was started while others train: do from now on what they do. Local."""
        self.members.enter(self)

    @contextmanager
    def waiting(self, what: str, *, patient: bool = False, among: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, this rank waits for others; the watchdog looks on (see Watchdog.waiting).

        `among`: ranks that all come to this wait, by default all; none where two ranks alone meet.
        Where a rank has died and MPI lets the others go on, RankLost is raised here, and soon on all of them.
        """
        group = self.group if among is None else self.group_of(among)
        with self.watchdog.waiting(what, patient=patient, group=group):
            try:
                yield
            except Exception as error:
                if self.size == 1 or not deaths.tells_of_a_death(error):
                    raise
                if left := deaths.departed(self, error):
                    raise RankLost(left) from error
                if not self.survives_deaths:
                    raise deaths.failed(self, what, error) from error
                deaths.end_waits(self)
                raise deaths.lost(self, what) from error

    def close(self) -> None:
        """Leave: stops Horovod and the watchdog. Blocks until all ranks have come; every rank must call."""
        if not self.is_rank:
            return
        forget_rank(self)
        self._finish()
        self._is_closed = True
        self.watchdog.leave()
        with suppress(RankLost):  # What all ranks had to do is done.
            self._meet_to_close()
        if self._horovod is not None:
            self._horovod.shutdown()
            self._horovod = None
        self.watchdog.stop()

    def _meet_to_close(self) -> None:
        # Of no group: ranks come here that have come to fewer waits than others.
        with self.waiting("close", patient=True, among=()):
            self.carrier.barrier()

    def leave_at_exit(self) -> None:
        """At the program's end, also of one that has not closed its World: the others may still wait for this rank."""

        def leave() -> None:
            if self._is_closed or not self.is_rank:
                return
            self.watchdog.leave()
            if self.group is not None and self.comm is not None and not self.survives_deaths:
                # Some may have closed their World, and wait for this rank there.
                with suppress(Exception):
                    self._meet_to_close()

        atexit.register(leave)

    def _on_host(self, tensor: torch.Tensor, what: str, reduce: Any) -> torch.Tensor:
        if self.size == 1:
            return tensor
        host = tensor.detach().cpu().contiguous()
        with self.waiting(what):
            reduce(host.numpy())
        if host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host)
        return tensor
