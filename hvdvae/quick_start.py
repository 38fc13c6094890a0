"""A rank's start without torch's compiler.

torch's optimizers load it, 1.6 s of a core and a quarter of a rank's start, only to tell it what it must not compile.
"""

import inspect
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def spare_the_compiler() -> None:
    """Let optimizers be made without it: for processes that compile nothing. Mutates torch's classes."""
    marked = (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict)
    for method in marked:
        plain: Any = getattr(method, "__wrapped__", None)
        if plain is not None:  # What torch's own mark would leave behind.
            plain.__dynamo_disable = plain


def bare(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Let its steps go without torch's wrappers (hooks, profiler, marks for the compiler). Mutates; returns it."""
    step = inspect.unwrap(type(optimizer).step)

    def taken() -> None:
        with torch.no_grad():
            step(optimizer)

    optimizer.step = taken  # type: ignore[method-assign, assignment]
    return optimizer
