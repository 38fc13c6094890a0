"""What torch's optimizers tell others of their steps, a strategy tells them, too."""

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

import hvdvae as hv
from hvdvae.strategies import Strategy


def _strategy() -> tuple[nn.Module, Strategy]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, hv.DistributedOptimizer(optimizer, model, world=hv.World.alone(), strategy="local")


def _step(model: nn.Module, optimizer: Strategy, *, set_to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()


def test_a_profiler_sees_step_and_zero_grad() -> None:
    model, optimizer = _strategy()
    _step(model, optimizer)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        _step(model, optimizer)
    names = {event.key for event in found.key_averages()}
    assert {"Optimizer.step#Local.step", "Optimizer.zero_grad#Local.zero_grad"} <= names


def test_hooks_that_come_later_are_called() -> None:
    model, optimizer = _strategy()
    _step(model, optimizer)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("own"))
    _step(model, optimizer)
    handle = register_optimizer_step_post_hook(lambda *_: called.append("global"))
    try:
        _step(model, optimizer)
    finally:
        handle.remove()
    _step(model, optimizer)
    assert called == ["own", "own", "global", "own"]


def test_zero_grad_sets_none_or_zeros() -> None:
    model, optimizer = _strategy()
    _step(model, optimizer)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    _step(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_learning_rate_schedule_counts_steps() -> None:
    model, optimizer = _strategy()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        _step(model, optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
