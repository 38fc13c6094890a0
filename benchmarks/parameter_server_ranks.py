"""What the ranks of benchmarks/parameter_server.py do: blocks of training, in one job, one kind after the other.

Rank 0 prints one line of JSON a measurement, with RESULT before it.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from benchmarks import side_pickling_server as pickling
from benchmarks.sides_trainer import Stretch
from benchmarks.task import LEARNING_RATE, Task, endless, open_splits
from hvdvae import DistributedOptimizer, Trainer, World
from hvdvae.ps.plan import Plan

RESULT = "result "
BATCH, WARMUP = 128, 20
KINDS: dict[str, Plan | None] = {
    "apart": None,
    "asp": Plan(),
    "asp, prefetch": Plan(prefetch=True),
    "bsp": Plan(consistency="bsp"),
    "pickling": None,
}


class Ranks:
    """All ranks of the job, and a barrier that does not burn the cores of those that compute."""

    def __init__(self) -> None:
        world = World.create(device="cpu")
        self.comm: Any = world.everyone
        self.rank, self.size = int(self.comm.rank), int(self.comm.size)

    def barrier(self) -> None:
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.001)

    def gather(self, value: Any) -> list[Any]:
        self.barrier()
        return list(self.comm.allgather(value))

    def tell(self, **result: Any) -> None:
        if self.rank == 0:
            print(RESULT + json.dumps(result), flush=True)


@contextmanager
def trained(ranks: Ranks, task: Task, kind: str, servers: int) -> Iterator[tuple[Callable[[int], None], World] | None]:
    """On workers a function that trains so many steps; None on ranks that do not train, after they have served."""
    workers = ranks.size - servers
    plan = KINDS[kind]
    if plan is not None:
        with served(ranks, plan, servers) as world:
            if world is None:
                yield None
                return
            model = task.network()
            adam = torch.optim.Adam(model.parameters(), LEARNING_RATE)
            optimizer = DistributedOptimizer(adam, model, world=world, strategy="ps", plan=plan)
            yield _trainer(task, model, optimizer, world.rank, workers), world
            return
    world = World.alone(device="cpu")
    model = task.network()
    adam = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    if kind == "pickling" and ranks.rank >= workers:
        pickling.serve(ranks.comm, model, adam, workers)
        yield None
    elif ranks.rank >= workers:
        yield None
    elif kind == "pickling":
        batches = endless(task.loader(ranks.rank, workers))
        run = pickling.worker_loop(
            ranks.comm, workers, model, lambda: task.objective(model, next(batches), 0.0)["loss"]
        )
        yield run, world
        run(0)
    else:
        optimizer = DistributedOptimizer(adam, model, world=world, strategy="local")
        yield _trainer(task, model, optimizer, ranks.rank, workers), world


@contextmanager
def served(ranks: Ranks, plan: Plan, servers: int) -> Iterator[World | None]:
    """The world of a worker; None on servers, once they have served."""
    from hvdvae.ps.serve import serve

    world = World.create(device="cpu", deadline=120, servers=servers)
    if world.role == "server":
        serve(world, plan)
        yield None
    else:
        yield world
    world.close()


def _trainer(task: Task, model: nn.Module, optimizer: Any, rank: int, workers: int) -> Callable[[int], None]:
    stretch = Stretch(task.loader(rank, workers))
    trainer = Trainer(model, optimizer, task.objective, stretch, seed=rank)

    def run(steps: int) -> None:
        stretch.set_length(steps)
        trainer.fit(trainer.position.epoch + 1)

    return run


def block(ranks: Ranks, task: Task, kind: str, servers: int, steps: int) -> None:
    """One measurement of a kind: examples/s of all workers, and the share of a step that a worker was blocked."""
    gc.collect()
    ranks.barrier()
    speed = blocked = 0.0
    with trained(ranks, task, kind, servers) as worker:
        if worker is not None:
            run, world = worker
            run(WARMUP)
            if world.size > 1:
                world.barrier()
            waited, start = world.watchdog.waited, time.perf_counter()
            run(steps)
            seconds = time.perf_counter() - start
            speed, blocked = steps * BATCH / seconds, (world.watchdog.waited - waited) / seconds
    speeds = ranks.gather([speed, blocked])
    ranks.tell(
        measured="training",
        kind=kind,
        servers=servers,
        examples_per_second=sum(s for s, _ in speeds),
        blocked=max(b for _, b in speeds),
    )


class Vector(nn.Module):
    """So many parameters and nothing to compute: the servers are the bottleneck."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(length))


def saturated(ranks: Ranks, task: Task, kind: str, count: int) -> None:
    """Workers push gradients of the model and pull its weights, with nothing to compute: pushes/s of the server."""
    gc.collect()
    ranks.barrier()
    workers = ranks.size - 1
    model = task.network()
    adam = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    times: list[float] = []
    if kind == "pickling":
        if ranks.rank >= workers:
            pickling.serve(ranks.comm, model, adam, workers)
        else:
            # The loss has gradients, and costs next to nothing.
            run = pickling.worker_loop(ranks.comm, workers, model, lambda: _sum(model))
            times = _times(lambda: run(1), count)
            run(0)
    else:
        with served(ranks, Plan(), 1) as world:
            if world is not None:
                optimizer = DistributedOptimizer(adam, model, world=world, strategy="ps", plan=Plan())
                times = _times(lambda: _step(optimizer, model), count)
    everyone = [found for found in ranks.gather(times) if found]
    ranks.tell(
        measured="saturated",
        kind=kind,
        pushes_per_second=sum(len(found) / sum(found) for found in everyone),
    )


def _sum(model: nn.Module) -> torch.Tensor:
    return torch.stack([parameter.sum() for parameter in model.parameters()]).sum()


def _step(optimizer: Any, model: nn.Module) -> None:
    optimizer.zero_grad()
    _sum(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _times(action: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each call, after some that are not counted."""
    times = []
    for number in range(count + WARMUP):
        start = time.perf_counter()
        action()
        if number >= WARMUP:
            times.append(time.perf_counter() - start)
    return times


def exchanges(ranks: Ranks, length: int, servers: int, workers: int, count: int, *, what: str) -> None:
    """Push and pull without computing in between: exchanges/s of all workers, and microseconds of one."""
    gc.collect()
    ranks.barrier()
    times: list[float] = []
    # Ranks that are neither stay out of the job's world: they sleep.
    part = ranks.comm.Split(int(ranks.rank < workers + servers), ranks.rank)
    with contextlib.suppress(StopIteration):
        times = _exchange(part, length, servers, count) if ranks.rank < workers + servers else []
    part.Free()
    everyone = [found for found in ranks.gather(times) if found]
    flat = [seconds for found in everyone for seconds in found]
    ranks.tell(
        measured=what,
        parameters=length,
        servers=servers,
        workers=workers,
        exchanges_per_second=sum(len(found) / sum(found) for found in everyone),
        microseconds=1e6 * statistics.median(flat),
    )


def _exchange(comm: Any, length: int, servers: int, count: int) -> list[float]:
    from hvdvae.deadline import Watchdog
    from hvdvae.launcher import Launch
    from hvdvae.ps.serve import serve
    from hvdvae.world import World as Joined
    from hvdvae.world.join import split_roles

    carrier = split_roles(comm, comm.rank >= comm.size - servers)
    watchdog = Watchdog(rank=comm.rank, size=comm.size, seconds=120)
    launch = Launch(launcher="mpirun", rank=comm.rank, size=comm.size)
    world = Joined(launch, carrier, torch.device("cpu"), watchdog, getattr(carrier, "comm", None), comm, servers)
    if world.role == "server":
        serve(world, Plan())
        world.close()
        return []
    model = Vector(length)
    adam = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    optimizer = DistributedOptimizer(adam, model, world=world, strategy="ps", plan=Plan())
    times = []
    for number in range(count + 3):
        start = time.perf_counter()
        optimizer.update()
        if number >= 3:
            times.append(time.perf_counter() - start)
    world.close()
    return times


def idle(ranks: Ranks, seconds: float) -> None:
    """The share of a core that a server uses while its workers are silent."""
    ranks.barrier()
    share = 0.0
    with served(ranks, Plan(), 1) as world:
        if world is not None:
            model = Vector(1000)
            adam = torch.optim.Adam(model.parameters(), LEARNING_RATE)
            optimizer = DistributedOptimizer(adam, model, world=world, strategy="ps", plan=Plan())
            optimizer.update()
            world.barrier()
            if world.rank == 0:
                pids = [int(pid) for pid in _server_pids()]
                before = [sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids]
                time.sleep(seconds)
                after = [sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids]
                share = max((b - a) / seconds for a, b in zip(before, after, strict=True))
            else:
                time.sleep(seconds)
    ranks.tell(measured="idle server", cores=max(ranks.gather(share)))


def _server_pids() -> list[int]:
    """Processes of this job whose rank is the last."""
    import os

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            same = variables.get("PMIX_NAMESPACE") == os.environ.get("PMIX_NAMESPACE")
            last = int(os.environ["OMPI_COMM_WORLD_SIZE"]) - 1
            if same and variables.get("OMPI_COMM_WORLD_RANK") == str(last):
                found.append(process.pid)
    return found


def bandwidth(ranks: Ranks, length: int) -> None:
    """Bytes/s that one core copies, read and written, over vectors of this length; and a fused Adam step's time."""
    if ranks.rank == 0:
        one, other = torch.zeros(length), torch.zeros(length)
        copies = _seconds(lambda: other.copy_(one))
        parameter = nn.Parameter(torch.zeros(length))
        parameter.grad = torch.zeros(length)
        adam = torch.optim.Adam([parameter], LEARNING_RATE, fused=True)
        adam.step()
        ranks.tell(
            measured="memory",
            parameters=length,
            copy_bytes_per_second=2 * one.nbytes / copies,
            adam_seconds=_seconds(adam.step),
            copy_seconds=copies,
        )
    ranks.barrier()


def _seconds(action: Callable[[], Any], count: int = 7) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Every rank of a job of four must call it: two workers, a server, and a rank that sleeps or is a second server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--large", type=int)
    parser.add_argument("--data")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ranks = Ranks()
    task = Task("mlp", open_splits(asked.data)[0][0], BATCH)
    if ranks.size == 3:
        for number in range(asked.rounds):
            kinds = list(KINDS)
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                block(ranks, task, kind, 1, asked.steps)
            for kind in ("asp", "pickling") if number % 2 else ("pickling", "asp"):
                saturated(ranks, task, kind, asked.steps)
        idle(ranks, 3.0)
        exchanges(ranks, 1000, 1, 1, 10 * asked.steps, what="round trip")
        return
    for _ in range(asked.rounds):
        bandwidth(ranks, asked.large)
        exchanges(ranks, asked.large, 1, 1, 5, what="one worker, one server")
        exchanges(ranks, asked.large, 1, 2, 5, what="two workers, one server")
        exchanges(ranks, asked.large, 2, 2, 5, what="two workers, two servers")


if __name__ == "__main__":
    main()
