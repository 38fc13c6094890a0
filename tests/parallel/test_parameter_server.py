"""Laws 2, 3, 6, 7 of the parameter server, at every split of the ranks into workers and servers."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError, WorldError
from hvdvae.ps.plan import COMPRESSIONS, Plan
from hvdvae.ps.protocol import HEADER, Kind, Request
from hvdvae.strategies import DistributedOptimizer, Strategy
from hvdvae.world import World
from tests.parallel.regression import OPTIMIZERS, loss_of, weights

pytest.importorskip("mpi4py")

STEPS, EXAMPLES = 7, 12
ALWAYS_ALIKE = (Plan(), Plan(consistency="ssp", staleness=0), Plan(consistency="bsp"))
WITHOUT_DELAY = (Plan(rule="staleness-lr"), Plan(rule="dcasgd"), Plan(rule="dcasgd-a"))


class Net(nn.Module):
    """BatchNorm, so that there are buffers, and enough parameters for cuts at multiples of the alignment."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 37), nn.BatchNorm1d(37), nn.Tanh(), nn.Linear(37, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Smooth(nn.Module):
    """Without BatchNorm, whose statistics are each worker's own: for what must equal the whole batch."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(EXAMPLES, 6, generator=generator), torch.randn(EXAMPLES, 3, generator=generator)


def plain(kind: type[nn.Module], build: Callable[..., Optimizer], each_step: Any = None) -> nn.Module:
    model = kind(100)
    optimizer = build(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *data()).backward()
        if each_step:
            each_step(step, optimizer)
        optimizer.step()
    return model


@contextmanager
def served(world: World, servers: int, plan: Plan, kind: type[nn.Module], build: Any, **options: Any) -> Iterator[Any]:
    """On workers (optimizer, model, world of the workers), all connected; None on servers, once they have served."""
    from hvdvae.ps.serve import serve

    if world.launcher in ("none", "horovodrun-gloo") or not 1 <= servers < world.size:
        pytest.skip(f"needs MPI and more than {servers} ranks")
    joined = World.create(device="cpu", deadline=60, servers=servers)
    if joined.role == "server":
        serve(joined, plan)
        joined.close()
        yield None
        return
    model = kind(100 + joined.rank)
    optimizer = DistributedOptimizer(
        build(model.parameters()), model, world=joined, strategy="ps", plan=plan, **options
    )
    yield optimizer, model, joined
    joined.close()


def train(optimizer: Any, model: nn.Module, world: World, each_step: Any = None) -> None:
    """This worker's examples, equal shares of all."""
    part = EXAMPLES // world.size
    mine = slice(world.rank * part, (world.rank + 1) * part)
    x, y = data()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x[mine], y[mine]).backward()
        if each_step:
            each_step(step, optimizer)
        optimizer.step()
    optimizer.finish()


@pytest.fixture(params=["shared memory", "messages"], autouse=True)
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How vectors travel: on one host, and, as between hosts, by message (with one optimizer, which says it all)."""
    if request.param == "messages":
        if request.node.callspec.params.get("name", "adam") != "adam":
            pytest.skip("with adam alone")
        monkeypatch.setattr("hvdvae.ps.opening.fits", lambda host, size: False)


def splits(world: World) -> list[int]:
    return [servers for servers in (1, 2, 3) if servers < world.size and EXAMPLES % (world.size - servers) == 0]


def workers_at_every_split(
    world: World, plan: Plan, kind: type[nn.Module], build: Any, **options: Any
) -> Iterator[Any]:
    """(optimizer, model, world of the workers) for each number of servers; servers serve, and get none."""
    for servers in splits(world):
        with served(world, servers, plan, kind, build, **options) as worker:
            if worker:
                yield worker


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("plan", [*ALWAYS_ALIKE, *WITHOUT_DELAY], ids=str)
def test_one_worker_is_local_training_bit_for_bit(world: World, name: str, plan: Plan) -> None:
    """Law 2, also over several servers, and with the buffers of BatchNorm."""
    model = Net(100)
    local = DistributedOptimizer(
        OPTIMIZERS[name](model.parameters()), model, world=World.alone(device="cpu"), strategy="local"
    )
    for _ in range(STEPS):
        local.zero_grad()
        loss_of(model, *data()).backward()
        local.step()
    with served(world, world.size - 1, plan, Net, OPTIMIZERS[name]) as worker:
        if worker is None:
            return
        train(*worker)
        optimizer, ours, _ = worker
        with optimizer.fetched(state=True):
            for (key, mine), theirs in zip(ours.state_dict().items(), model.state_dict().values(), strict=True):
                assert torch.equal(mine, theirs), key
            theirs, found = local.state_dict()["state"], optimizer.state_dict()["state"]
            assert found.keys() == theirs.keys()
            for number, entries in found.items():
                for key, value in entries.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[number][key])), (number, key)


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bsp_is_one_process_with_the_whole_batch(world: World, name: str, servers: int) -> None:
    """Law 2: so BSP is allreduce, for every optimizer."""
    with served(world, servers, Plan(consistency="bsp"), Smooth, OPTIMIZERS[name]) as worker:
        if worker:
            train(*worker)
            reference = weights(plain(Smooth, OPTIMIZERS[name]))
            torch.testing.assert_close(weights(worker[1]), reference, atol=3e-6, rtol=2e-5)
            assert worker[0].ledgers[0]["updates"] == STEPS


@pytest.mark.parametrize("servers", [1, 2])
def test_ssp_0_is_bsp_for_plain_sgd_with_pushes_scaled(world: World, servers: int) -> None:
    with served(world, servers, Plan(consistency="ssp", staleness=0), Smooth, OPTIMIZERS["sgd"]) as worker:
        if worker:
            for group in worker[0].param_groups:
                group["lr"] /= worker[2].size
            train(*worker)
            torch.testing.assert_close(
                weights(worker[1]), weights(plain(Smooth, OPTIMIZERS["sgd"])), atol=3e-6, rtol=2e-5
            )


@pytest.mark.parametrize("consistency", ["asp", "bsp"])
def test_all_of_a_vector_in_messages_is_the_vector(world: World, consistency: str) -> None:
    """A codec that leaves nothing out: as without, but for the rounding of differences."""
    plan = Plan(consistency=consistency, compression="topk", compression_share=1.0)
    for worker in workers_at_every_split(world, plan, Smooth, OPTIMIZERS["sgd"]):
        optimizer, model, joined = worker
        if joined.size > 1 and consistency == "asp":
            continue  # Who comes first is not decided.
        train(*worker)
        reference = weights(plain(Smooth, OPTIMIZERS["sgd"]))
        torch.testing.assert_close(weights(model), reference, atol=1e-5, rtol=1e-4)
        assert optimizer.results()["bytes_pushed"] == STEPS * joined.size * 8 * len(reference)


@pytest.mark.parametrize("codec", COMPRESSIONS)
def test_short_messages_train_and_all_end_with_the_servers_weights(world: World, codec: str) -> None:
    """With BatchNorm's buffers, a copy in between, and a second run after the first."""
    for optimizer, model, joined in workers_at_every_split(
        world, Plan(compression=codec), Net, lambda p: torch.optim.SGD(p, 0.05)
    ):
        loss = float(loss_of(model, *data()))
        for _ in range(2):
            for _ in range(4):
                train(optimizer, model, joined)
            if joined.is_first:
                with optimizer.fetched(state=True) as rows:
                    assert rows.shape[0] == joined.size
        assert len(set(joined.gather_bytes(weights(model).numpy().tobytes()))) == 1
        assert float(loss_of(model, *data())) < loss
        found, pushes = optimizer.results(), 8 * STEPS * joined.size
        whole = 4 * optimizer.flat.layout.length * pushes
        assert found["compression"] == codec
        assert 0 < found["compression_error"] < 1
        assert 0 < found["bytes_pushed"] < 0.8 * whole
        for name in ("bytes_pushed_per_push", "bytes_pulled_per_push"):
            assert optimizer.traffic()[name] == pytest.approx(found[name], rel=0.2), "as every epoch tells it"
        assert 0 < found["bytes_pulled"] < whole


@pytest.mark.parametrize("codec", COMPRESSIONS)
def test_workers_in_step_hold_the_same_weights_whatever_the_messages_leave_out(world: World, codec: str) -> None:
    plan = Plan(consistency="bsp", compression=codec)
    for optimizer, model, joined in workers_at_every_split(world, plan, Net, OPTIMIZERS["sgd"]):
        held: list[bytes] = []

        def look(
            step: int,
            _: Optimizer,
            optimizer: Strategy = optimizer,
            model: nn.Module = model,
            held: list[bytes] = held,
            is_first: bool = joined.is_first,
        ) -> None:
            if step == 2 and is_first:
                with optimizer.fetched():
                    pass  # Whoever looks at the servers' weights goes on with those that it had.
            held.append(weights(model).numpy().tobytes())

        train(optimizer, model, joined, look)
        assert len(set(held)) == STEPS, "they change"
        assert len(set(joined.gather_bytes(b"".join(held)))) == 1


def test_what_half_precision_cannot_hold_is_not_pushed(world: World) -> None:
    def grow(step: int, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.fill_(1e5 if step == 1 else 0.1)

    for optimizer, model, joined in workers_at_every_split(world, Plan(compression="fp16"), Smooth, OPTIMIZERS["sgd"]):
        train(optimizer, model, joined, grow)
        assert optimizer.skipped_steps == 1
        assert bool(torch.isfinite(weights(model)).all())


def test_schedules_and_changed_options_act_on_the_servers(world: World) -> None:
    """Law 7: learning rate and weight decay of two groups, changed while it runs; clipping of the mean gradient."""

    def two_groups(parameters: Iterable[nn.Parameter]) -> Optimizer:
        first, *rest = list(parameters)
        return torch.optim.AdamW([{"params": [first], "lr": 0.2, "weight_decay": 0.3}, {"params": rest}], 0.05)

    def change(step: int, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
        optimizer.param_groups[1]["weight_decay"] = 0.1 * step

    for worker in workers_at_every_split(world, Plan(consistency="bsp"), Smooth, two_groups):
        train(*worker, change)
        torch.testing.assert_close(weights(worker[1]), weights(plain(Smooth, two_groups, change)), atol=3e-6, rtol=2e-5)


def test_each_workers_pushes_are_applied_with_its_own_options(world: World) -> None:
    """Where workers do not step together. Without a gradient weight decay is all that moves the weights."""

    def build(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    with served(world, 1, Plan(), Smooth, build) as job:
        if job is None:
            return
        optimizer, model, mine = job
        start = weights(Smooth(100))

        def only_the_last_decays(step: int, optimizer: Any) -> None:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            if mine.rank == mine.size - 1:
                optimizer.param_groups[0]["weight_decay"] = 1.0

        train(optimizer, model, mine, only_the_last_decays)
        torch.testing.assert_close(weights(model), start * 0.9**STEPS)


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(consistency="bsp"), Plan(prefetch=True), Plan(rule="dcasgd"), Plan(push_every=2)],
    ids=str,
)
def test_weights_that_are_clamped_by_hand_are_the_servers_too(world: World, plan: Plan) -> None:
    """As a critic's of a Wasserstein GAN are, after each step. One worker is local training."""
    limit = 0.0625

    def clamped(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.clamp_(-limit, limit)

    for optimizer, model, mine in workers_at_every_split(world, plan, Smooth, OPTIMIZERS["sgd"]):
        x, y = data()
        alone, inner = Smooth(100), OPTIMIZERS["sgd"]
        expected = inner(alone.parameters())
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            with optimizer.editing():
                clamped(model)
            expected.zero_grad()
            loss_of(alone, x, y).backward()
            expected.step()
            clamped(alone)
        optimizer.finish()
        if mine.size == 1 and plan in (Plan(), Plan(consistency="bsp"), Plan(rule="dcasgd")):
            assert torch.equal(weights(model), weights(alone))
        elif plan.consistency == "bsp":  # All workers have the same examples.
            torch.testing.assert_close(weights(model), weights(alone))
        # A period's push takes along edits, then the sum of its gradients.
        if (mine.size == 1 or plan.consistency == "bsp") and plan.push_every == 1:
            assert float(weights(model).abs().max()) <= limit


def test_weights_that_are_changed_behind_the_servers_are_named(world: World) -> None:
    for optimizer, model, mine in workers_at_every_split(world, Plan(), Smooth, OPTIMIZERS["sgd"]):
        bias, pulled = model.layers[2].bias.data, torch.zeros(3)

        def change(step: int, optimizer: Any, bias: Tensor = bias, pulled: Tensor = pulled) -> None:
            if step == 3:
                pulled.copy_(bias)
                bias[-1] += 1e-3

        with pytest.raises(ConfigError, match=r"changed between two steps \(among layers\.0\.weight, .*editing\(\)"):
            train(optimizer, model, mine, change)
        with pytest.raises(ConfigError, match="changed between two steps"):
            optimizer.finish()
        bias.copy_(pulled)
        optimizer.finish()


def test_a_second_model_for_the_same_servers_is_refused_at_once(world: World) -> None:
    """They would hear of it never, and the workers wait."""
    for optimizer, model, mine in workers_at_every_split(world, Plan(), Smooth, OPTIMIZERS["sgd"]):
        other = Smooth(1)
        with pytest.raises(ConfigError, match=r"serve one model, and hold one already: .*'allreduce'"):
            DistributedOptimizer(OPTIMIZERS["sgd"](other.parameters()), other, world=mine, strategy="ps")
        with pytest.raises(ConfigError, match="serve one model"):
            World.create(device="cpu", servers=mine.servers)
        train(optimizer, model, mine)


def test_options_may_be_numbers_of_numpy(world: World) -> None:
    """As schedules compute them; a server is sent plain ones, and none that the optimizer does not know."""

    def build(parameters: Iterable[nn.Parameter]) -> Optimizer:
        group = {"params": list(parameters), "weight_decay": np.float32(0.25), "note": print}
        return torch.optim.AdamW([group], lr=np.float64(0.05), betas=(np.float64(0.5), np.float64(0.75)))

    def change(step: int, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = np.float32(0.5**step)

    for worker in workers_at_every_split(world, Plan(consistency="bsp"), Smooth, build):
        train(*worker, change)
        torch.testing.assert_close(weights(worker[1]), weights(plain(Smooth, build, change)), atol=3e-6, rtol=2e-5)


@pytest.mark.parametrize("what", ["weight_decay", "backward_passes_per_step", "clip_norm"])
def test_workers_with_other_options_are_refused(world: World, what: str) -> None:
    if world.size < 3:
        pytest.skip("needs two workers and a server")
    odd = world.rank == 1
    options = {what: (2 if odd else 1)} if what != "weight_decay" else {}

    def build(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(parameters, 0.1, weight_decay=0.5 if odd and what == "weight_decay" else 0.0)

    with (
        pytest.raises(WorldError, match=f"rank 1 joins .*{what}"),
        served(world, 1, Plan(), Smooth, build, **options),
    ):
        pass


@pytest.mark.parametrize("plan", ALWAYS_ALIKE, ids=str)
def test_one_worker_that_clips_is_local_training_bit_for_bit(world: World, plan: Plan) -> None:
    model = Smooth(100)
    local = DistributedOptimizer(
        OPTIMIZERS["sgd"](model.parameters()), model, world=World.alone(device="cpu"), strategy="local", clip_norm=0.05
    )
    for _ in range(STEPS):
        local.zero_grad()
        loss_of(model, *data()).backward()
        local.step()
    with served(world, world.size - 1, plan, Smooth, OPTIMIZERS["sgd"], clip_norm=0.05) as worker:
        if worker:
            train(*worker)
            assert torch.equal(weights(worker[1]), weights(model))


def test_bsp_clips_the_mean_gradient(world: World) -> None:
    def clip(step: int, optimizer: Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.05)

    for worker in workers_at_every_split(world, Plan(consistency="bsp"), Smooth, OPTIMIZERS["sgd"], clip_norm=0.05):
        train(*worker)
        torch.testing.assert_close(
            weights(worker[1]), weights(plain(Smooth, OPTIMIZERS["sgd"], clip)), atol=3e-6, rtol=2e-5
        )


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(prefetch=True),
        Plan(consistency="ssp", staleness=1),
        Plan(consistency="ssp", staleness=1, prefetch=True),
        Plan(rule="staleness-lr"),
        Plan(rule="dcasgd"),
        Plan(rule="dcasgd-a"),
        Plan(consistency="bsp", prefetch=True),
    ],
    ids=str,
)
def test_every_push_is_applied_once_and_the_bound_holds(world: World, plan: Plan) -> None:
    """Law 3, counted on both sides, with workers of different speed; and all end with the same weights."""
    for optimizer, model, mine in workers_at_every_split(world, plan, Smooth, OPTIMIZERS["sgd"]):
        lags = []

        def slow(step: int, optimizer: Any, mine: World = mine, lags: list[int] = lags) -> None:
            if mine.rank == 0:
                torch.randn(300, 300) @ torch.randn(300, 300)
            clocks = optimizer.client.clocks
            lags.append(clocks[mine.rank] - min(clocks))

        train(optimizer, model, mine, slow)
        if plan.consistency == "ssp":
            assert plan.staleness is not None
            assert max(lags) <= plan.staleness
        for ledger in optimizer.ledgers:
            assert ledger["applied_by_worker"] == [STEPS] * mine.size
            assert ledger["pushes"] == STEPS * mine.size == sum(ledger["staleness_histogram"].values())
            assert ledger["duplicate_pushes"] == ledger["dropped_pushes"] == 0
            assert ledger["updates"] == (STEPS if plan.consistency == "bsp" else STEPS * mine.size)
        final = weights(model)
        assert mine.gather_bytes(final.numpy().tobytes()) == [final.numpy().tobytes()] * mine.size
        assert float((final - weights(Smooth(100))).norm()) > 0.01


def test_backup_workers_drop_what_comes_late(world: World) -> None:
    plan = Plan(consistency="bsp", backup_workers=1)
    if world.size < 3:
        pytest.skip("needs two workers")
    with served(world, 1, plan, Smooth, OPTIMIZERS["sgd"]) as worker:
        if worker:
            train(*worker)
            (ledger,) = worker[0].ledgers
            assert ledger["pushes"] + ledger["dropped_pushes"] == STEPS * worker[2].size
            # The last steps may have fewer members: some workers have ended by then.
            assert ledger["updates"] > 0
            assert ledger["pushes"] <= ledger["updates"] * (worker[2].size - 1)


@pytest.mark.parametrize("plan", [Plan(rule="easgd", push_every=2), Plan(push_every=2, fetch_every=4)], ids=str)
def test_workers_that_step_by_themselves_come_together(world: World, plan: Plan) -> None:
    """Elastic averaging, and Downpour with periods: fewer messages, and the loss falls."""
    for optimizer, model, mine in workers_at_every_split(world, plan, Smooth, OPTIMIZERS["sgd"]):
        train(optimizer, model, mine)
        assert optimizer.ledgers[0]["pushes"] == -(-STEPS // 2) * mine.size, "the end cuts the last period short"
        assert loss_of(model, *data()).item() < loss_of(Smooth(100), *data()).item()


def test_a_step_that_one_must_skip_costs_the_others_nothing_that_they_remember(world: World) -> None:
    """Under bsp all skip it: what their pushes were to make up for is still to come."""
    plan = Plan(consistency="bsp", compression="topk", compression_share=0.1)
    with served(world, 1, plan, Smooth, OPTIMIZERS["adam"]) as connected:
        if connected is None:
            return
        optimizer, model, mine = connected
        kept = []

        def spoil(step: int, optimizer: Any) -> None:
            kept.append(optimizer.client._pushes[0]._feedback.remembered.clone())
            if step == 2 and mine.rank == 0:
                optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")

        train(optimizer, model, mine, spoil)
        assert optimizer.skipped_steps == 1
        assert kept[2].any()
        assert torch.equal(kept[3], kept[2])
        assert not torch.equal(kept[4], kept[3])


def test_a_gradient_that_is_not_finite_changes_nothing(world: World) -> None:
    """Under ASP it is that worker's step; under BSP all skip it, as with allreduce."""
    for consistency, updates in (("asp", lambda n: STEPS * n - 1), ("bsp", lambda n: STEPS - 1)):
        with served(world, 1, Plan(consistency=consistency), Smooth, OPTIMIZERS["adam"]) as worker:
            if not worker:
                continue
            optimizer, model, mine = worker

            def poison(step: int, optimizer: Any, mine: World = mine) -> None:
                if step == 2 and mine.rank == mine.size - 1:
                    optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")

            train(optimizer, model, mine, poison)
            assert torch.isfinite(weights(model)).all()
            assert optimizer.ledgers[0]["updates"] == updates(mine.size)
            last = mine.size - 1
            assert optimizer.skipped_steps == int(consistency == "bsp" or mine.rank == last), "all know it"
            assert optimizer.ledgers[0]["dropped_pushes"] == (last if consistency == "bsp" else 0)
            assert optimizer.ledgers[0]["skipped_by_worker"] == [0] * last + [1]


@pytest.mark.parametrize("plan", [Plan(push_every=2 * STEPS), Plan(rule="easgd", push_every=2 * STEPS)], ids=str)
def test_a_run_shorter_than_a_period_trains(world: World, plan: Plan) -> None:
    for optimizer, model, mine in workers_at_every_split(world, plan, Smooth, OPTIMIZERS["sgd"]):
        train(optimizer, model, mine)
        assert optimizer.ledgers[0]["updates"] == mine.size
        assert loss_of(model, *data()).item() < loss_of(Smooth(100), *data()).item()


def test_a_period_of_which_no_step_was_finite_pushes_nothing(world: World) -> None:
    """A zero gradient would let momentum and decay move the weights."""
    with served(world, 1, Plan(push_every=2), Smooth, OPTIMIZERS["adam"]) as worker:
        if not worker:
            return
        optimizer, model, mine = worker

        def poison(step: int, optimizer: Any) -> None:
            if step in (2, 3):
                optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")

        train(optimizer, model, mine, poison)
        assert optimizer.ledgers[0]["pushes"] == (-(-STEPS // 2) - 1) * mine.size
        assert optimizer.ledgers[0]["skipped_by_worker"] == [1] * mine.size


def test_a_push_ahead_has_the_statistics_of_its_own_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It travels while the next forward pass writes them anew."""
    from hvdvae.ps.client import Client

    push, pushed = Client.push, []

    def late(client: Client, *arguments: Any, **options: Any) -> None:
        time.sleep(0.05)
        pushed.append(client.outgoing[-1].item())
        push(client, *arguments, **options)

    monkeypatch.setattr(Client, "push", late)
    with served(world, 1, Plan(prefetch=True), Net, OPTIMIZERS["sgd"]) as worker:
        if not worker:
            return
        optimizer, model, mine = worker
        due = []

        def note(step: int, optimizer: Any) -> None:
            due.append(model.layers[1].running_var[-1].item())

        train(optimizer, model, mine, note)
        assert pushed == due


def test_a_copy_is_of_one_moment_on_all_servers(world: World) -> None:
    """While the others push, worker 0 copies: every server has applied the same pushes in it."""
    for optimizer, model, mine in workers_at_every_split(world, Plan(), Smooth, OPTIMIZERS["adam"]):

        def copy(step: int, optimizer: Any, mine: World = mine) -> None:
            if mine.rank == 0 and step:
                with optimizer.fetched(state=True):
                    steps = {float(entries["step"]) for entries in optimizer.state_dict()["state"].values()}
                assert len(steps) == 1, "Adam counts its steps: pieces of all servers have taken the same"

        train(optimizer, model, mine, copy)


def test_a_push_that_is_sent_again_is_applied_once(world: World) -> None:
    """As a worker does that has waited in vain for the answer."""
    for optimizer, model, mine in workers_at_every_split(world, Plan(), Smooth, OPTIMIZERS["sgd"]):

        def again(step: int, optimizer: Any) -> None:
            if step == 3:
                optimizer.client._sequence -= 1
                optimizer.update()

        train(optimizer, model, mine, again)
        for ledger in optimizer.ledgers:
            assert ledger["duplicate_pushes"] == mine.size
            assert ledger["applied_by_worker"] == [STEPS] * mine.size


@pytest.mark.parametrize("plan", [Plan(rule="easgd", push_every=2), Plan(push_every=2, fetch_every=4)], ids=str)
def test_a_copy_leaves_a_worker_what_is_its_own(world: World, plan: Plan) -> None:
    """Where workers step by themselves, worker 0 has the servers' weights only while it evaluates or saves them."""
    for optimizer, model, mine in workers_at_every_split(world, plan, Smooth, OPTIMIZERS["adam"]):

        def copy(step: int, optimizer: Any, model: nn.Module = model, mine: World = mine) -> None:
            if mine.rank == 0 and step == STEPS - 1:
                own, state = weights(model), optimizer.state_dict()["state"]
                with optimizer.fetched(state=True):
                    assert not torch.equal(weights(model), own)
                assert torch.equal(weights(model), own)
                torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)

        train(optimizer, model, mine, copy)


def test_a_worker_that_has_not_pushed_yet_counts_with_the_first_buffers(world: World) -> None:
    """BatchNorm's variance is 1 before the first step, on all; 0 would be nobody's."""
    for optimizer, model, mine in workers_at_every_split(world, Plan(), Net, OPTIMIZERS["sgd"]):

        def copy(step: int, optimizer: Any, model: nn.Module = model, mine: World = mine) -> None:
            if mine.rank == 0 and step == 0:
                with optimizer.fetched():
                    variance = dict(model.named_buffers())["layers.1.running_var"]
                    assert float(variance.min()) > 0.8

        optimizer.start()
        train(optimizer, model, mine, copy)


def test_no_push_overtakes_the_first_weights(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI keeps order between two ranks only: a server may hear worker 1 before worker 0."""
    from hvdvae.ps.channel import Channel

    receive, has_overtaken = Channel.receive, []

    def late(channel: Channel, *source: int) -> Any:
        found = receive(channel, *source)
        if channel.rank >= channel.workers > 1 and found[1][Request.KIND] == Kind.INIT:
            give_up = time.monotonic() + 0.2
            while time.monotonic() < give_up and not has_overtaken:
                if channel.comm.Iprobe(1, HEADER):
                    has_overtaken.append(channel.rank)
        return found

    monkeypatch.setattr(Channel, "receive", late)
    for worker in workers_at_every_split(world, Plan(), Smooth, OPTIMIZERS["sgd"]):
        train(*worker)
    assert not has_overtaken, "worker 1 has pushed before the servers had the weights"


def test_a_signal_to_one_server_reaches_all_workers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last server gets it; a worker's answers of the first come first."""
    if world.launcher in ("none", "horovodrun-gloo"):
        pytest.skip("needs MPI")
    from hvdvae.ps.server import Server

    run = Server.run

    def interrupted(server: Server) -> None:
        if world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        run(server)

    monkeypatch.setattr(Server, "run", interrupted)
    for optimizer, model, mine in workers_at_every_split(world, Plan(), Smooth, OPTIMIZERS["sgd"]):
        train(optimizer, model, mine)
        assert optimizer.signal == signal.SIGUSR1


def test_optimizers_that_need_whole_tensors_are_refused(world: World) -> None:
    if world.size > 1:
        pytest.skip("refused before anybody meets")
    from hvdvae.strategies.ps import ParameterServer

    model = Smooth(0)
    with pytest.raises(ConfigError, match="Adafactor is not elementwise"):
        ParameterServer(torch.optim.Adafactor(model.parameters()), model, world, plan=Plan())
