"""The user's torch optimizer, rebuilt over flat vectors: one fused kernel for all parameters of a group.

Exact for optimizers that treat each element by itself (Adam, SGD, ...). Others (Adafactor, Muon, anybody's own)
keep their per-tensor form: the tensors are views of the same vectors, so the strategies do not notice.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import CheckpointError, ConfigError
from hvdvae.flat import FlatModel
from hvdvae.flat_views import apart
from hvdvae.quick_start import bare

ELEMENTWISE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


COUNTERS = ("step", "mu_product", "eta", "mu")
"""Entries of their states that are one number a parameter, whatever its shape: steps taken, and functions of them."""


def check_supported(optimizer: Optimizer) -> None:
    """Raises ConfigError for optimizers whose step needs more than gradients of one moment."""
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        several = isinstance(optimizer, torch.optim.LBFGS)
        why = "evaluates the loss several times a step" if several else "needs sparse gradients"
        raise ConfigError(
            f"optimizer {type(optimizer).__name__} {why}, which ranks cannot average: use another one of torch.optim"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ConfigError(
            f"optimizer {type(optimizer).__name__} has differentiable=True, and steps of ranks cannot be "
            "differentiated through: drop it"
        )


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer on a slice equals that slice of a step on the whole."""
    return type(optimizer) in ELEMENTWISE


def check_elementwise(optimizer: Optimizer, why: str) -> None:
    """Raises ConfigError for optimizers that are not; `why` they would have to be."""
    if is_elementwise(optimizer):
        return
    parent = next((kind.__name__ for kind in type(optimizer).__mro__ if kind in ELEMENTWISE), None)
    what = f"is a class of its own (its parent is {parent}), which may look at whole parameters"
    raise ConfigError(
        f"{why}, and {type(optimizer).__name__} {what if parent else 'is not elementwise'}: use SGD, Adam, AdamW, "
        "RMSprop or Adagrad of torch.optim"
    )


def flat_optimizer(optimizer: Optimizer, flat: FlatModel, places: Sequence[slice] = ()) -> Optimizer:
    """An optimizer of the same class over one vector a group; their `.grad` is whoever's who steps it to set.

    `places`: of the vectors in `flat.parameters` (default: the whole groups).
    Returns the optimizer itself where it is not elementwise. The state of `optimizer` is not carried over here
    (`load_per_tensor` does that).
    """
    if not is_elementwise(optimizer):
        return optimizer
    groups: list[dict[str, Any]] = []
    for group, part in zip(optimizer.param_groups, places or flat.group_slices, strict=True):
        vector = nn.Parameter(flat.parameters[part])
        groups.append({**group, "params": [vector], **_fused(optimizer, group, flat.parameters.dtype)})
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    return bare(type(optimizer)(groups, **{**defaults, **_fused(optimizer, optimizer.defaults, flat.parameters.dtype)}))


def _fused(optimizer: Optimizer, options: dict[str, Any], dtype: torch.dtype) -> dict[str, bool]:
    """Choose the fused kernel where the class has one and the user has not chosen otherwise."""
    if dtype not in (torch.float32, torch.float64):
        return {}  # torch 2.13's fused SGD leaves most of a vector of half precision as it was, on a CPU.
    unset = options.get("fused", False) is None and not options.get("foreach")
    free = not options.get("differentiable") and not options.get("capturable")
    return {"fused": True} if unset and free and not isinstance(options.get("lr"), Tensor) else {}


def per_tensor_state(inner: Optimizer, flat: FlatModel) -> dict[int, dict[str, Any]]:
    """The state of a flat optimizer as a plain torch optimizer would hold it: parameter number -> name -> tensor.

    Vectors are split without a copy, each part with a storage of its own (flat_views.py); counters are cloned.
    """
    state: dict[int, dict[str, Any]] = {}
    number = 0
    for index, group in enumerate(inner.param_groups):
        vector = group["params"][0]
        pieces = {
            key: list(map(apart, flat.split(value, index))) if _is_aligned(value, vector) else value
            for key, value in inner.state.get(vector, {}).items()
        }
        for position in range(len(flat.groups[index])):
            state[number] = {
                key: value[position] if isinstance(value, list) else _clone(value) for key, value in pieces.items()
            }
            number += 1
    return {number: entries for number, entries in state.items() if entries}


def load_per_tensor(inner: Optimizer, flat: FlatModel, entries: Iterator[tuple[int, str, Any]]) -> None:
    """Fill a flat optimizer's state from the per-parameter state of any torch optimizer of its class, entry by entry.

    `entries`: parameter number, name, value. Parameters without state (never stepped) count as zeros, with a warning.
    Raises CheckpointError where a shape does not fit, or where parameters of one group have taken different numbers of
    steps.
    """
    inner.state.clear()
    homes = [(index, place) for index, group in enumerate(flat.groups) for place in range(len(group))]
    history: dict[int, dict[str, Any]] = {}
    for number, key, value in entries:
        index, place = homes[number]
        history.setdefault(number, {})[key] = value if key in COUNTERS else None
        group = inner.param_groups[index]
        vector = group["params"][0]
        state = inner.state[vector]
        if not isinstance(value, Tensor) or key in COUNTERS:
            state.setdefault(key, counter(key, value, vector, bool(group.get("fused"))))
            continue
        if key not in state:
            state[key] = torch.zeros_like(vector, requires_grad=False)
        piece = flat.split(state[key], index)[place]
        check_shape(value, piece.shape)
        piece.copy_(value)
    _check_history(inner, flat, history)


def _check_history(inner: Optimizer, flat: FlatModel, history: dict[int, dict[str, Any]]) -> None:
    """Whether one vector of a group can hold what its parameters have gone through.

    Raises CheckpointError where they have taken different numbers of steps. Warns of one that has taken none while
    others did: exact while it has no gradient, as what is never used.
    """
    start = 0
    for group, parameters in zip(inner.param_groups, flat.groups, strict=True):
        found = [
            {key: float(value or 0) for key, value in history.get(number, {}).items()}
            for number in range(start, start + len(parameters))
        ]
        names = flat.names[start : start + len(parameters)]
        start += len(parameters)
        stepped = next((place for place, entries in enumerate(found) if entries), 0)
        odd = next((place for place, entries in enumerate(found) if entries != found[stepped]), None)
        # What has not moved yet is as good as at rest, in SGD without dampening.
        if odd is None or (set(found[stepped]) == {"momentum_buffer"} and not group["dampening"]):
            continue
        advice = "give what was not always trained a group of its own, or wrap the optimizer before its first step"
        if found[odd] or isinstance(inner, torch.optim.Rprop):
            raise CheckpointError(
                f"parameter {names[odd]!r} has taken other steps than {names[stepped]!r} of the same group, and they "
                f"are to be stepped as one vector: {advice}"
            )
        warnings.warn(
            f"parameter {names[odd]!r} has taken no step, {names[stepped]!r} of the same group has: it goes on as if "
            f"its gradients had been zero; {advice}",
            stacklevel=2,
        )


def check_shape(value: Tensor, expected: torch.Size) -> None:
    """Raises CheckpointError: a fused kernel would write past the end of a state of another shape."""
    if value.shape != expected:
        raise CheckpointError(
            f"optimizer state has shape {tuple(value.shape)} for a parameter of shape {tuple(expected)}: it was saved "
            "from another model"
        )


def _is_aligned(value: Any, vector: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == vector.shape


def counter(key: str, value: Any, vector: Tensor, fused: bool) -> Any:
    """A number that a parameter has in the state, a copy; plain ones, as torch had them before 1.12, become tensors."""
    if key in COUNTERS and isinstance(value, int | float):
        wide = torch.get_default_dtype() == torch.float64
        value = torch.tensor(float(value), dtype=torch.float64 if wide else torch.float32)
    # A fused kernel reads its count of steps where the parameters are, as float32.
    if fused and isinstance(value, Tensor):
        return value.detach().clone().to(vector.device, torch.float32)
    return _clone(value)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
