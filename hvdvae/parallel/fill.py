"""A model that was split before it had numbers: built on torch's meta device, cut, and filled layer by layer.

Each layer is drawn whole, as an unsplit model draws it, and cut: equal initial weights, and no rank ever holds more of
the model than its part and one layer (one step and its gradients while rank 0 measures where to cut).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvdvae.parallel.parts import Cut


def fill(
    model: nn.Module,
    whole: nn.Module,
    cuts: Mapping[str, Cut],
    device: torch.device,
    drawn: Callable[[str], None] = lambda name: None,
) -> None:
    """Give a part its initial numbers, from torch's default generator. Local. Mutates the model.

    `model`: the part, without numbers. `whole`: the same model, not split, without numbers; its layers draw in the
    order of its modules. `cuts`: as Parts'. `drawn`: told the name of every layer that has drawn, while it has its
    numbers.
    """
    for name, layer in whole.named_modules():
        with filled([layer], torch.device("cpu")):
            drawn(name)
            for key, tensor in _own(layer).items():
                _place(model, f"{name}.{key}", tensor, cuts, device)


@contextmanager
def filled(layers: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, layers that have no numbers have initial ones. Local."""
    empty = [layer for layer in layers if any(tensor.is_meta for tensor in _own(layer).values())]
    for layer in empty:
        layer.to_empty(device=device, recurse=False)
        layer.reset_parameters()  # type: ignore[operator]
    try:
        yield
    finally:
        for layer in empty:
            layer.to_empty(device=torch.device("meta"), recurse=False)


def _own(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def _place(model: nn.Module, name: str, tensor: Tensor, cuts: Mapping[str, Cut], device: torch.device) -> None:
    path, _, key = name.rpartition(".")
    try:
        home = model.get_submodule(path)
        there = _own(home)[key]
    except (AttributeError, KeyError):
        return  # Another stage's.
    mine = cuts[name].of_whole(tensor) if name in cuts else tensor
    room = torch.empty_like(there, device=device)
    room.copy_(mine.detach())
    is_parameter = isinstance(there, nn.Parameter)
    setattr(home, key, nn.Parameter(room, requires_grad=there.requires_grad) if is_parameter else room)
