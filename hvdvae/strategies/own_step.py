"""What users want of an optimizer's class besides torch's: arguments of `step`, closures, methods (train, eval, ...).

Optimizers of torch that step element by element run over vectors and have none of these. All others step themselves,
on the model's own tensors, and are given what the user gives.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from hvdvae.errors import ConfigError

if TYPE_CHECKING:
    from hvdvae.strategies.strategy import Strategy

WITHOUT_GRADIENTS = ("train", "eval")
"""Methods that schedule-free optimizers have, and call before and after steps."""


class NotFinite(Exception):
    """Leaves a step whose gradient is not finite."""


def check_arguments(optimizer: Optimizer, arguments: dict[str, Any], *, steps_itself: bool) -> None:
    """Raises ConfigError for arguments of `step` where torch's own optimizers step, which have none. Local."""
    if arguments and not steps_itself:
        name = type(optimizer).__name__
        raise ConfigError(f"step() got {', '.join(arguments)}, and torch.optim.{name} has no such argument: drop it")


def check_first_order(optimizer: Optimizer, tensors: list[Any]) -> None:
    """Raises ConfigError where gradients have a graph and the optimizer is one that may want it. Local."""
    if type(optimizer).__module__.startswith("torch."):
        return
    if any(tensor.grad is not None and tensor.grad.grad_fn is not None for tensor in tensors):
        raise ConfigError(
            f"gradients of {type(optimizer).__name__} have a graph (backward(create_graph=True)): second derivatives "
            "(Sophia, AdaHessian) are each rank's own, and are not exchanged. Use an optimizer of first order, or "
            "backward() without a graph"
        )


def reach(strategy: "Strategy", optimizer: Optimizer, name: str) -> Any:
    """Return an attribute of the wrapped optimizer; a method that would see a rank's own gradients is refused. Local.

    Raises AttributeError, and when it is called ConfigError.
    """
    found = getattr(optimizer, name)
    if name in WITHOUT_GRADIENTS or not callable(found) or getattr(found, "__self__", None) is not optimizer:
        return found

    @functools.wraps(found)
    def call(*args: Any, **kwargs: Any) -> Any:
        strategy.check_exchanged(f"{type(optimizer).__name__}.{name}()")
        try:
            return found(*args, **kwargs)
        finally:
            strategy.follow_own_step()

    return call


def with_closure(
    strategy: "Strategy", closure: Callable[[], Any], arguments: dict[str, Any], prepare: Callable[[], None]
) -> Any:
    """Let the optimizer evaluate the closure, as often as it wants; each time gradients are exchanged.

    prepare: exchanges them, and raises NotFinite where they are not; the parameters are as they were then. Returns the
    last loss. What the optimizer gets is the mean loss over ranks. Blocks; every rank must call it.
    """
    last: list[Any] = [None]

    def evaluate() -> Any:
        with torch.enable_grad():
            last[0] = closure()
        prepare()
        return strategy.mean_loss(last[0])

    if not strategy.takes_closures:
        raise ConfigError(
            f"--compression remembers what messages left out once a step, and {strategy.wrapped_class} may evaluate "
            "its closure several times: drop --compression, or call step() without a closure"
        )
    before = strategy.flat.parameters.clone()
    strategy.arguments = {**arguments, "closure": evaluate}
    try:
        strategy.update()
    except NotFinite:
        strategy.flat.take_back()
        strategy.flat.parameters.copy_(before)
        raise
    return last[0]
