"""Optimizers that step themselves: closures, arguments and methods of their own, on the mean of all ranks' gradients.

The classes here are small ones with the interfaces of those that people use.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.strategies import DistributedOptimizer
from hvdvae.world import World
from tests.parallel.regression import examples, loss_of, network, share, weights

STEPS = 3
WAYS: dict[str, dict[str, Any]] = {
    "allreduce, horovod": {"engine": "horovod"},
    "allreduce, mpi": {"engine": "mpi"},
}


class Sharpness(Optimizer):
    """The interface of SAM: a step up, the gradient there, and back down from where it was with that."""

    def __init__(self, params: Iterable[nn.Parameter], base: Callable[..., Optimizer], rho: float = 0.5) -> None:
        super().__init__(params, {"rho": rho, "lr": 0.1})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad, alpha=float(self.param_groups[0]["rho"] / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Polyak(Optimizer):
    """Its step is as long as the loss that the closure returns says."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        parameters = self.param_groups[0]["params"]
        square = sum(float(p.grad.square().sum()) for p in parameters)
        for p in parameters:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * float(loss) / (square + 1.0))
        return loss


class Scaled(torch.optim.SGD):
    """A subclass with a step of its own, an argument, and methods."""

    mode = "train"

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: float = 1.0) -> Any:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=scale * self.param_groups[0]["lr"])

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"

    def steepness(self) -> float:
        return float(self.param_groups[0]["params"][0].grad.norm())


class Curvature(torch.optim.SGD):
    """The interface of AdaHessian: it takes the gradient's gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad.grad_fn is not None:
                p.sub_(p.grad)


def sharpness(model: nn.Module) -> Optimizer:
    return Sharpness(model.parameters(), lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9))


def polyak(model: nn.Module) -> Optimizer:
    return Polyak(model.parameters())


def plainly(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def whole(model: nn.Module) -> Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=0.05)


def both(
    world: World, name: str, build: Callable[[nn.Module], Optimizer], loop: Any, **options: Any
) -> tuple[Any, Any]:
    """Weights after `loop` for the wrapped optimizer on this rank's examples, and for the plain one on all."""
    if world.launcher == "horovodrun-gloo" and "horovod" not in name:
        pytest.skip("horovodrun --gloo has no MPI")
    if world.launcher != "none" and "horovod" in name:
        pytest.importorskip("horovod.torch")
    model, single = network(seed=100), network(seed=100)
    optimizer = DistributedOptimizer(build(model), model, world=world, **WAYS[name], **options)
    alone = build(single)
    x, y = examples()
    for _ in range(STEPS):
        loop(model, optimizer, x[share(world)], y[share(world)])
        loop(single, alone, x, y)
    assert len(set(world.gather_bytes(weights(model).numpy().tobytes()))) == 1, "the same bits on all ranks"
    return weights(model), weights(single)


def two_phases(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """As SAM's own page has it: backward, then step with a closure."""

    def closure() -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    loss_of(model, x, y).backward()
    optimizer.step(closure)
    optimizer.zero_grad()


def zeros(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """The same with gradients that are zeroed in place."""

    def closure() -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    optimizer.zero_grad(set_to_none=False)
    loss_of(model, x, y).backward()
    optimizer.step(closure)


def closures(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """As torch has it: all in the closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    found = optimizer.step(closure)
    assert float(found.detach()) > 0


def by_methods(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    """Step by step; ranks exchange before each."""
    synchronize = getattr(optimizer, "synchronize", lambda: None)
    loss_of(model, x, y).backward()
    synchronize()
    optimizer.first_step(zero_grad=True)
    loss_of(model, x, y).backward()
    synchronize()
    optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("build", "loop"),
    [
        (sharpness, two_phases),
        (sharpness, zeros),
        (sharpness, by_methods),
        (polyak, closures),
        (plainly, closures),
        (whole, closures),
    ],
    ids=lambda function: function.__name__,
)
def test_every_gradient_that_a_closure_makes_is_exchanged(world: World, name: str, build: Any, loop: Any) -> None:
    torch.testing.assert_close(*both(world, name, build, loop), atol=2e-6, rtol=2e-5)


def test_a_closure_of_accumulated_passes_and_clipped(world: World) -> None:
    found = []
    for passes in (1, 2):
        model = network(seed=100)
        optimizer = DistributedOptimizer(
            sharpness(model), model, world=world, engine="mpi", backward_passes_per_step=passes, clip_norm=0.1
        )
        x, y = (tensor[share(world)] for tensor in examples())

        def backward(model: nn.Module = model, passes: int = passes, x: Tensor = x, y: Tensor = y) -> None:
            for part, target in zip(x.chunk(passes), y.chunk(passes), strict=True):
                loss_of(model, part, target).backward()

        for _ in range(STEPS):
            backward()
            optimizer.step(backward)
            optimizer.zero_grad()
        found.append(weights(model))
        assert optimizer.gradient_norm > 0.1
    torch.testing.assert_close(*found, atol=2e-6, rtol=2e-5)


def test_a_closure_that_is_not_finite_on_a_rank_leaves_all_as_they_were(world: World) -> None:
    """Also amid SAM's two steps, where the weights are elsewhere."""
    model = network(seed=100)
    optimizer = DistributedOptimizer(sharpness(model), model, world=world, engine="mpi")
    x, y = (tensor[share(world)] for tensor in examples())
    start = weights(model)

    def closure() -> Tensor:
        loss = loss_of(model, x, y) * (float("nan") if world.rank == world.size - 1 else 1.0)
        loss.backward()
        return loss

    loss_of(model, x, y).backward()
    optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    assert torch.equal(weights(model), start)
    optimizer.zero_grad()
    two_phases(model, optimizer, x, y)
    assert optimizer.skipped_steps == 1
    assert not torch.equal(weights(model), start)


def test_arguments_of_step_reach_an_optimizer_that_has_them(world: World) -> None:
    def loop(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step(scale=0.25)

    torch.testing.assert_close(
        *both(world, "allreduce, mpi", lambda model: Scaled(model.parameters(), 0.1), loop), atol=2e-6, rtol=2e-5
    )
    model = network(seed=100)
    optimizer = DistributedOptimizer(torch.optim.Adam(model.parameters()), model, world=world, engine="mpi")
    with pytest.raises(ConfigError, match=r"step\(\) got scale, and torch.optim.Adam has no such argument"):
        optimizer.step(scale=0.25)


def test_methods_of_the_class_reach_it(world: World) -> None:
    model = network(seed=100)
    optimizer: Any = DistributedOptimizer(Scaled(model.parameters(), 0.1), model, world=world, engine="mpi")
    optimizer.eval()
    assert optimizer.mode == "eval"
    loss_of(model, *(tensor[share(world)] for tensor in examples())).backward()
    optimizer.train()
    assert optimizer.mode == "train"
    if world.size > 1:
        with pytest.raises(ConfigError, match=r"Scaled.steepness\(\) between backward and step .*synchronize"):
            optimizer.steepness()
    optimizer.synchronize()
    assert len(set(world.gather_objects(optimizer.steepness()))) == 1
    optimizer.step()
    optimizer.steepness()
    with pytest.raises(AttributeError):
        optimizer.nothing_of_the_kind()
    assert not hasattr(optimizer, "nothing_of_the_kind")


def test_second_derivatives_are_refused_by_name(world: World) -> None:
    model = network(seed=100)
    optimizer = DistributedOptimizer(Curvature(model.parameters(), 0.1), model, world=world, engine="mpi")
    with pytest.warns(UserWarning, match="create_graph"):
        loss_of(model, *examples()).backward(create_graph=True)
    with pytest.raises(ConfigError, match=r"gradients of Curvature have a graph \(backward\(create_graph=True\)\)"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
def test_a_graph_that_nobody_wants_is_let_go(world: World) -> None:
    """backward(create_graph=True), then synchronize(): no step keeps the graph of the last."""
    model = network(seed=100)
    optimizer = DistributedOptimizer(plainly(model), model, world=world, engine="mpi")
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, *(tensor[share(world)] for tensor in examples())).backward(create_graph=True)
        optimizer.synchronize()
        assert all(parameter.grad.grad_fn is None for parameter in model.parameters())
        assert not optimizer.flat.gradient.requires_grad
        optimizer.step()


def test_what_cannot_be_is_refused(world: World) -> None:
    model = network(seed=100)
    optimizer = DistributedOptimizer(
        sharpness(model), model, world=world, engine="mpi", compression="topk", compression_share=0.5
    )
    with pytest.raises(
        ConfigError, match=r"--compression remembers .* Sharpness may evaluate its closure several times"
    ):
        two_phases(model, optimizer, *(tensor[share(world)] for tensor in examples()))
    other = network(seed=100)
    with pytest.raises(ConfigError, match=r"Scaled is a class of its own \(its parent is SGD\)"):
        DistributedOptimizer(Scaled(other.parameters(), 0.1), other, world=world, strategy="sharded")
    sparse = nn.Module()
    sparse.table = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(ConfigError, match=r"parameter 'table' is sparse \(torch.sparse_coo\)"):
        DistributedOptimizer(torch.optim.SGD(sparse.parameters(), 0.1), sparse, world=world, engine="mpi")
