"""A strategy's state_dict: that of the plain torch optimizer that it wraps, so that it loads there, and the other way.

The optimizer inside steps vectors; its state is cut into that of parameters (flat_optimizer.py), and frozen parameters
keep their numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hvdvae.checkpoint import Piece
from hvdvae.errors import CheckpointError
from hvdvae.flat import FlatModel
from hvdvae.strategies.flat_optimizer import is_elementwise, load_per_tensor, per_tensor_state
from hvdvae.strategies.group_options import take_options

Groups = list[dict[str, Any]]
Entries = Iterator[tuple[int, str, Any]]
"""Of a state: number of a parameter, name, value."""
Scalars = dict[str, dict[str, Any]]
LOOSE = -1
"""Stands for the number of a parameter where an optimizer keeps something that belongs to none, by its name."""


def own_state(wrapped: Optimizer, flat: FlatModel, inner: Optimizer, numbers: Sequence[int]) -> dict[Any, Any]:
    """The state as `wrapped` would save it, had it taken the steps of `inner`. Views. Local; runs no hooks.

    `numbers`: of the trained parameters, in the numbering of `wrapped`.
    """
    if is_elementwise(wrapped):
        return {numbers[place]: entries for place, entries in per_tensor_state(inner, flat).items()}
    every = [parameter for group in inner.param_groups for parameter in group["params"]]
    number_of = {id(parameter): number for number, parameter in enumerate(every)}
    return {number_of.get(id(key), key): entries for key, entries in inner.state.items()}


def load_state(
    wrapped: Optimizer, inner: Optimizer, flat: FlatModel, numbers: Sequence[int], groups: Groups, entries: Entries
) -> None:
    """Load what a strategy, or `wrapped`, saved into `inner` and the groups of `wrapped`, entry by entry. Local.

    Raises CheckpointError where groups or shapes do not fit this model.
    """
    if is_elementwise(wrapped):
        take_groups(wrapped, groups)
        load_per_tensor(inner, flat, of_trained(numbers, entries))
        return
    state: dict[Any, Any] = {}
    for number, key, value in entries:
        (state if number == LOOSE else state.setdefault(number, {}))[key] = value
    load_whole(inner, {"state": state, "param_groups": groups})


def load_whole(inner: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state_dict into an optimizer that is stepped as it is; its groups stay the same objects. Local."""
    mine = inner.param_groups
    take_groups(inner, state_dict["param_groups"])
    inner.load_state_dict({**state_dict, "param_groups": pack(mine)})
    # torch puts new groups in their place, and whoever holds the old ones would write old counts back.
    for group, loaded in zip(mine, inner.param_groups, strict=True):
        group.update(loaded)
    inner.param_groups = mine


def take_groups(wrapped: Optimizer, saved: Groups) -> None:
    """Load options (learning rate, ...). Local. Raises CheckpointError where groups are of other sizes."""
    theirs, mine = ([len(group["params"]) for group in groups] for groups in (saved, wrapped.param_groups))
    if theirs != mine:
        raise CheckpointError(
            f"optimizer state has groups of {theirs} parameters, this optimizer has {mine}: it was saved from another "
            "model"
        )
    for group, values in zip(wrapped.param_groups, saved, strict=True):
        take_options(group, values)


def of_trained(numbers: Sequence[int], entries: Entries) -> Entries:
    """Those of trained parameters, numbered among them."""
    places = {number: place for place, number in enumerate(numbers)}
    for number, key, value in entries:
        if number in places:
            yield places[number], key, value


def entries_of(state: dict[int, dict[str, Any]]) -> Entries:
    """A state_dict's state, entry by entry."""
    for number, found in state.items():
        for key, value in found.items():
            yield number, key, value


def pieces_of(state: dict[int, dict[str, Any]]) -> tuple[dict[str, Piece], Scalars]:
    """What a checkpoint keeps of a state: tensors, as NUMBER/ENTRY, and scalars, by number and entry. Local."""
    pieces: dict[str, Piece] = {}
    scalars: Scalars = {}
    if loose := {str(key): value for key, value in state.items() if not isinstance(key, int)}:
        scalars[str(LOOSE)] = loose
    for number, key, value in entries_of({key: found for key, found in state.items() if isinstance(key, int)}):
        if isinstance(value, Tensor):
            pieces[f"{number}/{key}"] = Piece.of(value)
        else:
            scalars.setdefault(str(number), {})[key] = value
    return pieces, scalars


def pack(groups: Groups) -> Groups:
    """Groups with the numbers of their parameters in place of them. Pure."""
    packed, number = Groups(), 0
    for group in groups:
        count = len(group["params"])
        options = {key: value for key, value in group.items() if key != "params"}
        packed.append({**options, "params": [*range(number, number + count)]})
        number += count
    return packed


def follow(groups: Groups, inner: Optimizer) -> None:
    """Hand what schedules and users changed in `groups` to the inner optimizer. Local."""
    if inner.param_groups is groups:
        return
    for mine, theirs in zip(groups, inner.param_groups, strict=True):
        theirs.update({key: value for key, value in mine.items() if key not in ("params", "fused")})
