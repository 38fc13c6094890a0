"""Options of a torch optimizer's groups: those that users set, and those in which the optimizer itself keeps count.

Schedule-free optimizers, Prodigy, LAMB and others keep their steps, or what they have learned of the data, in
`param_groups`, beside the learning rate. Whoever resumes a run sets the former anew, and takes the latter from the
checkpoint.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdvae.dtypes import DTYPES
from hvdvae.errors import ConfigError

Groups = list[dict[str, Any]]
_PLACES = ("params", "param_names", "fused")
"""What is no option, or this machine's own."""
_LARGEST = 4096
"""Numbers of a tensor that is written as text."""


class CountedOptions:
    """Names of the options that an optimizer's own step has changed."""

    def __init__(self) -> None:
        """None is known yet."""
        self.names: set[str] = set()

    def step(self, optimizer: Optimizer, **arguments: Any) -> None:
        """Step it with these arguments, and look which options are others after it. Local; 1 us a group."""
        before = [dict(group) for group in optimizer.param_groups]
        optimizer.step(**arguments)
        for old, new in zip(before, optimizer.param_groups, strict=True):
            for key, value in new.items():
                if old.get(key, self) is not value and key != "params":
                    self.names.add(key)


def take_options(mine: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Copy a saved group's options into one of a live optimizer; a tensor or tuple stays what it is. Local."""
    for key, value in saved.items():
        if key in ("params", "fused"):
            continue
        present, found = mine.get(key), from_text(value)
        if isinstance(present, Tensor) and isinstance(found, Tensor | int | float):
            found = torch.as_tensor(found).to(present.device, present.dtype)
        elif isinstance(present, tuple) and isinstance(found, list):
            found = tuple(found)
        elif isinstance(present, Enum):
            found = type(present)(found)
        mine[key] = found


def set_anew(
    optimizer: Optimizer, mine: Mapping[str, Any], saved: Mapping[str, Any], counted: Iterable[str]
) -> dict[str, Any]:
    """Of `mine`, a group of a run that is to be resumed, what rules over the saved group: what a user has set. Pure.

    Not `counted`, what steps have changed; nor what the optimizer has by itself, without an argument for it.
    """
    own = {*counted, *(optimizer.defaults.keys() - _arguments(optimizer))}
    return {key: value for key, value in mine.items() if key in _PLACES or (key not in own and key in saved)}


def without_tensors(groups: Groups) -> Groups:
    """Groups as JSON can hold them, for `take_options`. Raises ConfigError naming an option that it cannot."""
    return [{key: as_text(value, f"option {key!r}") for key, value in group.items()} for group in groups]


def as_text(value: Any, name: str) -> Any:
    """A value of an optimizer as JSON can hold it, for `from_text`. Raises ConfigError by `name` where it cannot."""
    if isinstance(value, list | tuple):
        return [as_text(entry, name) for entry in value]
    if isinstance(value, Tensor) and value.numel() <= _LARGEST:
        return {"tensor": value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, Enum):
        return as_text(value.value, name)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"entries": {key: as_text(entry, name) for key, entry in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    found = f"tensor of {value.numel()} numbers" if isinstance(value, Tensor) else type(value).__name__
    raise ConfigError(
        f"{name} of the optimizer is a {found}, expected numbers, texts or small tensors, which checkpoints of the "
        "Trainer hold as text: save a loop of your own with optimizer.checkpoint(), or take another optimizer"
    )


def from_text(value: Any) -> Any:
    """What `as_text` has written, or a copy of what is no text. Pure."""
    if isinstance(value, dict) and value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=DTYPES[value["dtype"]])
    if isinstance(value, dict) and value.keys() == {"dtype"}:
        return DTYPES[value["dtype"]]
    if isinstance(value, dict) and value.keys() == {"entries"}:
        return {key: from_text(entry) for key, entry in value["entries"].items()}
    if isinstance(value, list):
        return [from_text(entry) for entry in value]
    return copy.deepcopy(value)


def _arguments(optimizer: Optimizer) -> set[str]:
    """Names that a user can give when building one; of a class that hands on **kwargs, also its parents'."""
    names: set[str] = set()
    for kind in type(optimizer).__mro__:
        if kind is Optimizer:
            return names | optimizer.defaults.keys()  # They came by **kwargs: nobody knows better.
        if "__init__" in vars(kind):
            found = inspect.signature(vars(kind)["__init__"]).parameters.values()
            names |= {argument.name for argument in found}
            if not any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in found):
                break
    return names
