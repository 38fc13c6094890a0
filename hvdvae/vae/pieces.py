"""A network as pieces that run one after the other, each with layers of its own: where it can be cut."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class Piece(NamedTuple):
    """Some layers."""

    modules: tuple[str, ...]
    """Their names in the network."""
    run: Callable[[Tensor], Tensor]


def pieces_of(network: nn.Sequential, name: str) -> list[Piece]:
    """Each layer with parameters, and what follows it without."""
    groups: list[list[tuple[str, nn.Module]]] = []
    for child, layer in network.named_children():
        if not groups or list(layer.parameters()):
            groups.append([])
        groups[-1].append((f"{name}.{child}", layer))
    return [Piece(tuple(name for name, _ in group), _in_turn(network, [name for name, _ in group])) for group in groups]


def before(function: Callable[[Tensor], Tensor], piece: Piece) -> Piece:
    """The piece on what a function makes of its input."""
    return Piece(piece.modules, lambda x: piece.run(function(x)))


def after(piece: Piece, function: Callable[[Tensor], Tensor]) -> Piece:
    """The function of what a piece gives."""
    return Piece(piece.modules, lambda x: function(piece.run(x)))


def through(pieces: list[Piece], x: Tensor) -> Tensor:
    """All of them, one after the other."""
    for piece in pieces:
        x = piece.run(x)
    return x


def _in_turn(network: nn.Sequential, names: list[str]) -> Callable[[Tensor], Tensor]:
    # Looked up when it runs: layers may have been split or replaced since.
    children = [name.rpartition(".")[2] for name in names]

    def run(x: Tensor) -> Tensor:
        for child in children:
            x = network.get_submodule(child)(x)
        return x

    return run
