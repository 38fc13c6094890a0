"""`hvd.broadcast_optimizer_state(optimizer, root_rank)`: after one rank has loaded a checkpoint, all have its state.

Horovod broadcasts in place into the tensors of `state_dict()`. An optimizer that has no state yet it steps first, on
that rank alone, with gradients of zero; of its own wrapper it steps the class beneath, without an exchange. So a step
that comes from there makes a state, and asks no other rank.
"""

import sys

import torch
from torch import Tensor
from torch.optim import Optimizer

_FUNCTIONS = "horovod.torch.functions"
_AT_THE_START = {"step": 0.0, "mu_product": 1.0, "mu": 1.0}
"""Numbers that a state begins with; `eta` begins as the learning rate."""


def steps_for_horovod() -> bool:
    """Whether Horovod's broadcast_optimizer_state has called the step that this is asked in. Local."""
    if _FUNCTIONS not in sys.modules:
        return False
    frame = sys._getframe(1)
    for _ in range(8):  # Decorators stand between.
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _FUNCTIONS:
            return True
    return False


@torch.no_grad()
def begin_state(inner: Optimizer, parameters: Tensor, *, is_flat: bool) -> None:
    """Give an optimizer the state that it begins with, and leave the parameters (P,) as they are. Local.

    Of a class that is not elementwise it is the state after a step on gradients of zero, as Horovod makes it.
    """
    kept = parameters.clone()
    decays = [group.get("weight_decay", 0) for group in inner.param_groups]
    gradients = [parameter.grad for group in inner.param_groups for parameter in group["params"]]
    for group in inner.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    inner.step()
    for group, decay in zip(inner.param_groups, decays, strict=True):
        if "weight_decay" in group:
            group["weight_decay"] = decay
        if not is_flat:
            continue
        for parameter in group["params"]:
            for key, value in inner.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and key in _AT_THE_START:
                    value.fill_(_AT_THE_START[key])
                elif isinstance(value, Tensor) and key == "eta":
                    value.fill_(float(group["lr"]))
    every = [parameter for group in inner.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(every, gradients, strict=True):
        parameter.grad = gradient
    parameters.copy_(kept)
