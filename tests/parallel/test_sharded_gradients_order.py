"""ZeRO stage 2 sends gradients while backward computes them: none is lost, whatever a loop does, and nobody waits.

What one process with the data of all ranks does is what is expected; plain SGD, where a gradient of zero is as good as
none. Buckets are so small that each layer has one or two.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.strategies.sharded_gradients import ShardedGradients
from hvdvae.strategies.sync_batch_norm import convert_sync_batch_norm
from hvdvae.world import World
from tests.parallel.regression import weights

STEPS = 3
Loop = Callable[["Net", torch.optim.Optimizer, Tensor, int], None]
"""(model, optimizer, inputs of a rank (8, 4), number of that rank): what a user writes for a step."""


@pytest.fixture(params=[90, 10_000], ids=["several buckets", "one bucket"], autouse=True)
def _buckets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdvae.strategies.sharded_gradients.BUCKET_BYTES", request.param)


class Net(nn.Module):
    """Layers that a loss may leave out, or use several times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other = nn.Linear(4, 2)


def inputs(rank: int, step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def trained(world: World, engine: str, loop: Loop, **options: object) -> tuple[Tensor, ShardedGradients]:
    model = Net()
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        world=world,
        engine=engine,
        strategy="sharded",
        zero_stage=2,
        **options,
    )
    assert isinstance(optimizer, ShardedGradients)
    for step in range(STEPS):
        loop(model, optimizer, inputs(world.rank, step), world.rank)
    return weights(model), optimizer


class Averaging(torch.optim.SGD):
    """One process in the place of all ranks: takes a step once each of them has come, on the mean."""

    def __init__(self, parameters: object, ranks: int, passes: int) -> None:
        super().__init__(parameters, 0.1)  # type: ignore[arg-type]
        self.ranks, self.passes, self.come = ranks, passes, 0
        self.sums: dict[nn.Parameter, Tensor] = {}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        for parameter in parameters:
            if parameter.grad is not None:
                self.sums[parameter] = self.sums.get(parameter, 0) + parameter.grad  # type: ignore[assignment]
        self.come += 1
        self.zero_grad()
        if self.come == self.ranks:
            for parameter, found in self.sums.items():
                parameter.grad = found / self.ranks / self.passes
            super().step()
            self.zero_grad()
            self.come, self.sums = 0, {}


def expected(world: World, loop: Loop, passes: int = 1) -> Tensor:
    model = Net()
    optimizer = Averaging(model.parameters(), world.size, passes)
    for step in range(STEPS):
        for rank in range(world.size):
            loop(model, optimizer, inputs(rank, step), rank)
    return weights(model)


def twice(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """Two losses; the first does not reach the first layer."""
    optimizer.zero_grad()
    model.head(model.shared(x)).square().mean().backward()
    model.head(model.shared(model.first(x))).square().mean().backward()
    optimizer.step()


def many(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """Passes in any order, over layers of any order, and more of them on some ranks."""
    optimizer.zero_grad()
    for part in x.split(2)[: 2 + rank % 2]:
        model.other(model.first(part)).square().mean().backward()
        model.head(part).square().mean().backward()
        model.first(torch.tanh(model.head(model.shared(part)))).square().mean().backward()
    optimizer.step()


def nothing_on_a_rank(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """A rank without data for this step."""
    optimizer.zero_grad()
    if rank == 0:
        model.head(model.shared(model.first(x))).square().mean().backward()
    optimizer.step()


def other_layers(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """Each rank uses layers of its own, and one that all use comes twice on some."""
    optimizer.zero_grad()
    hidden = model.shared(x) if rank % 2 else model.shared(torch.tanh(model.shared(x)))
    (model.head(hidden) if rank % 2 else model.other(hidden)).square().mean().backward()
    optimizer.step()


def reentrant(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """One layer in two reentrant checkpoints: its gradient comes twice in one backward."""
    optimizer.zero_grad()
    hidden = model.first(x)
    for _ in range(2):
        hidden = checkpoint(lambda h: torch.tanh(model.shared(h)), hidden, use_reentrant=True)
    (model.head(hidden) + model.head(model.first(x))).square().mean().backward()
    optimizer.step()


def modules_zero_grad(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """The model clears its gradients, and what another loss has left in it."""
    model.head(x).square().mean().backward()
    model.zero_grad()
    model.head(model.shared(model.first(x))).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def zeroed(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """As the last, without None."""
    model.head(x).square().mean().backward()
    model.zero_grad(set_to_none=False)
    model.head(model.shared(model.first(x))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def none_by_hand(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """The loop clears them itself."""
    for parameter in model.parameters():
        parameter.grad = None
    model.head(model.shared(model.first(x))).square().mean().backward()
    optimizer.step()


def dropped(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """A loss of other layers on each rank that nobody wants (a generator's, in its discriminator), then another."""
    (model.head(x) if rank % 2 else model.head(model.shared(x))).square().mean().backward()
    optimizer.zero_grad()
    model.head(model.first(x)).square().mean().backward()
    optimizer.step()


def asked(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """torch.autograd.grad between passes leaves what has come alone."""
    optimizer.zero_grad()
    model.head(model.first(x)).square().mean().backward()
    torch.autograd.grad(
        model.head(model.first(x)).square().mean(), [*model.head.parameters(), *model.first.parameters()]
    )
    model.head(model.first(x)).square().sum().backward()
    torch.autograd.grad(model.head(x).square().mean(), [model.head.weight])
    optimizer.step()


def by_hand(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """Gradients that no backward made, and one that was there before it."""
    optimizer.zero_grad()
    model.first.weight.grad = torch.full((4, 4), float(rank + 1))
    model.head.bias.grad = x.sum(0)
    model.head(x).square().mean().backward()
    optimizer.step()


def hooked(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """A gradient's hook, made after wrapping."""
    optimizer.zero_grad()
    handle = model.head.weight.register_hook(lambda gradient: gradient * 0.5)
    model.head(model.first(x)).square().mean().backward()
    handle.remove()
    optimizer.step()


def with_a_graph(model: Net, optimizer: torch.optim.Optimizer, x: Tensor, rank: int) -> None:
    """backward() that is asked for a graph."""
    optimizer.zero_grad()
    (model.head(model.first(x)) ** 3).mean().backward(create_graph=True)
    optimizer.step()


LOOPS = [
    twice,
    many,
    nothing_on_a_rank,
    other_layers,
    reentrant,
    modules_zero_grad,
    zeroed,
    none_by_hand,
    dropped,
    asked,
    by_hand,
    hooked,
    with_a_graph,
]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_gradient_counts_once(world: World, engine: str, loop: Loop) -> None:
    found, _ = trained(world, engine, loop)
    torch.testing.assert_close(found, expected(world, loop), atol=2e-6, rtol=2e-5)
    assert len(set(world.gather_bytes(found.numpy().tobytes()))) == 1, "the same bits on all ranks"


def test_a_second_round_is_of_the_buckets_that_need_one(world: World) -> None:
    """What is sent for one late gradient is its bucket, not the whole model."""
    _, optimizer = trained(world, "mpi", reentrant)
    sent = optimizer.traffic()["bytes_sent_per_step"]
    length = optimizer.flat.parameters.numel()
    once = 2 * 4 * length * (world.size - 1) / world.size  # A reduce-scatter and an allgather.
    assert sent <= 1.5 * once + 8


class Normalized(nn.Module):
    """A sum over ranks in backward, before it a layer that some rank does not use."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.rank = rank
        self.a, self.norm, self.b, self.d = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        if self.rank == 0:
            h = self.b(h)
        out: Tensor = self.d(h)
        return out


def test_sums_of_others_in_backward_hold_nobody_up(world: World, engine: str) -> None:
    """SyncBatchNorm's, with a layer that one rank does not use: buckets and sums come in another order there."""
    found = []
    for options in ({"strategy": "allreduce"}, {"strategy": "sharded", "zero_stage": 2}):
        model = convert_sync_batch_norm(Normalized(world.rank), world)
        plain = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = DistributedOptimizer(plain, model, world=world, engine=engine, **options)  # type: ignore[arg-type]
        for step in range(STEPS):
            optimizer.zero_grad()
            (model(inputs(world.rank, step)) - 1).square().mean().backward()
            optimizer.step()
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=2e-5)


def clip_norm_(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_value_(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1.0)


def scale(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


def read(model: nn.Module) -> None:
    _ = [float(parameter.grad.norm()) for parameter in model.parameters() if parameter.grad is not None]


def copied(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = torch.zeros_like(parameter)


def partly_cleared(model: nn.Module) -> None:
    next(p for p in model.parameters() if p.grad is not None).grad = None


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (clip_norm_, "of the gradient of 'first.weight'.*clip_norm"),
        (clip_value_, "of the gradient of 'first.weight'"),
        (scale, "mul_ of the gradient of 'first.weight'"),
        (read, "norm of the gradient of 'first.weight'"),
        (copied, ".grad of 'first.weight' was replaced"),
        (partly_cleared, ".grad of 'first.weight' was cleared after backward, and that of"),
    ],
    ids=lambda value: getattr(value, "__name__", "message"),
)
def test_a_gradient_that_was_sent_is_not_used_in_silence(
    world: World, use: Callable[[nn.Module], None], message: str
) -> None:
    model = Net()
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine="mpi", strategy="sharded", zero_stage=2
    )
    model.head(model.first(inputs(world.rank, 0))).square().mean().backward()

    def go_on() -> None:
        use(model)
        optimizer.step()

    with pytest.raises(ConfigError, match=message):
        go_on()


def test_a_hook_that_would_change_what_was_sent_is_told(world: World) -> None:
    model = Net()
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, world=world, engine="mpi", strategy="sharded", zero_stage=2
    )
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.mul_(0.1))  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match="mul_ of the gradient of 'head"):
        model.head(inputs(world.rank, 0)).square().mean().backward()
    assert optimizer.skipped_steps == 0


def test_wrapping_anew_leaves_nothing_of_the_first(world: World) -> None:
    """A cell of a notebook that is run twice: the first optimizer takes no gradient away from the second."""
    model, single = Net(), Net()
    old = []
    for options in ({"strategy": "sharded", "zero_stage": 2}, {"strategy": "sharded", "zero_stage": 2}, {}):
        plain = torch.optim.SGD(model.parameters(), 0.1)
        old.append(DistributedOptimizer(plain, model, world=world, engine="mpi", **options))  # type: ignore[arg-type]
    alone = Averaging(single.parameters(), world.size, 1)
    for step in range(STEPS):
        twice(model, old[-1], inputs(world.rank, step), world.rank)
        for rank in range(world.size):
            twice(single, alone, inputs(rank, step), rank)
    torch.testing.assert_close(weights(model), weights(single), atol=2e-6, rtol=2e-5)
