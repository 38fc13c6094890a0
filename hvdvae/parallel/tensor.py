"""Layers split by their neurons over ranks, as Megatron-LM does it (Shoeybi et al. 2019, arXiv:1909.08053).

    x (B, I) -- first, my H/T rows --> (B, H/T) -- activation -- second, my H/T columns --> (B, O), a part of a sum
    forward: one allreduce, of the second's outputs; backward: one, of the first's inputs' gradient

Layers come in such pairs: what stands between them, activation and BatchNorm, is never whole anywhere. Linear by
neurons, convolutions by channels. Layers that find no partner, or share their weights with others, stay whole on every
rank: equal inputs, equal results.

Shapes: B examples, I inputs, H hidden, O outputs; T ranks that share a layer.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hvdvae.errors import ConfigError
from hvdvae.first_order import refuse_graph
from hvdvae.parallel.parts import Cut
from hvdvae.world import World

_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Identity)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
"""What may stand between two layers of a pair: it does to each neuron the same, or to each by itself."""
_DIMS: tuple[tuple[type[nn.Module], str, tuple[int, int]], ...] = (
    (nn.Linear, "linear", (0, 1)),
    (nn.ConvTranspose2d, "convolution", (1, 0)),
    (nn.Conv2d, "convolution", (0, 1)),
)
"""Class, kind, and which dimensions of the weight are outputs and inputs."""


def split_layers(model: nn.Module, chains: Sequence[str], group: World) -> dict[str, Cut]:
    """Keep of the model's layers this rank's part. Local; every rank of `group` must do it.

    `chains`: names of submodules whose layers run one after the other, in the order in which they were registered.
    Mutates the model: names of parameters stay, some become smaller. Returns how those were cut, by name. Raises
    ConfigError where there is nothing to split.
    """
    cuts: dict[str, Cut] = {}
    for chain in chains:
        for first, norms, second in pairs_of(model, chain, group.size):
            for norm in norms:
                cuts |= _split_norm(model.get_submodule(norm), norm, group)
            for name, kind, dim in ((first, Outputs, 0), (second, Inputs, 1)):
                layer: Any = model.get_submodule(name)
                along = _dims(layer)[dim]
                cut = Cut.of(along, layer.weight.shape[along], group)
                cuts[f"{name}.weight"] = cut
                if kind is Outputs and layer.bias is not None:
                    cuts[f"{name}.bias"] = Cut(0, cut.start, cut.stop, cut.length)
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, kind(layer, cut, group))
    if not cuts:
        raise ConfigError(
            f"--tensor {group.size}: found no two layers of one kind in a row, with {group.size} neurons or channels "
            "or more and only activations and BatchNorm between them, that could be split; use a wider or deeper "
            "model, or --tensor 1"
        )
    return cuts


class Outputs(nn.Module):
    """A layer that computes this rank's share of its outputs: the first of a pair."""

    def __init__(self, layer: Any, cut: Cut, group: World) -> None:
        super().__init__()
        # In a list: names in checkpoints stay as they are.
        self._layer, self._group = [layer], group
        self.weight = _cut(layer.weight, cut)
        self.bias = _cut(layer.bias, Cut(0, cut.start, cut.stop, cut.length)) if layer.bias is not None else None
        _empty(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, ...) to (B, H/T, ...). Its backward blocks; every rank of the group must come to it."""
        whole: Tensor = _Fan.apply(x, self._group)  # type: ignore[no-untyped-call]
        state: dict[str, Tensor] = {"weight": self.weight}
        if self.bias is not None:
            state["bias"] = self.bias
        y: Tensor = functional_call(self._layer[0], state, (whole,))
        return y


class Inputs(nn.Module):
    """A layer that reads this rank's share of its inputs, and sums over ranks: the second of a pair."""

    def __init__(self, layer: Any, cut: Cut, group: World) -> None:
        super().__init__()
        self._layer, self._group = [layer], group
        self.weight = _cut(layer.weight, cut)
        self.bias = layer.bias
        layer.bias = None
        # Without a dimension for examples: there may be none.
        self._shape = (-1, *([1] * (self.weight.dim() - 2)))
        _empty(layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H/T, ...) to (B, O, ...). Blocks; every rank of the group must call it."""
        part = functional_call(self._layer[0], {"weight": self.weight}, (x,))
        y: Tensor = _Sum.apply(part, self._group)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype).view(self._shape)


class _Fan(torch.autograd.Function):
    """The same to all ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: World) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        refuse_graph("a layer that is split over ranks")
        return _summed(gradients[0], ctx.group, "backward of a split layer"), None


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient goes to all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: World) -> Tensor:
        return _summed(x, group, "forward of a split layer")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        refuse_graph("a layer that is split over ranks")
        return gradients[0], None


def _summed(x: Tensor, group: World, what: str) -> Tensor:
    # In float32 whatever the layers compute in: MPI sums bfloat16 to NaN.
    wide = x.detach().float() if x.dtype in (torch.bfloat16, torch.float16) else x.detach().clone()
    return group.sum_(wide.contiguous(), what).to(x.dtype)


class Pair(NamedTuple):
    """Names of two layers, and of the BatchNorms between them."""

    first: str
    norms: list[str]
    second: str


def pairs_of(model: nn.Module, chain: str, count: int) -> Iterator[Pair]:
    """Neighbours that split most weights, none of them twice."""
    everywhere = model.named_modules(remove_duplicate=False)
    holders = Counter(tensor for _, module in everywhere for tensor in module._parameters.values())
    layers: list[tuple[str, Any]] = [
        (".".join(filter(None, (chain, name))), module)
        for name, module in model.get_submodule(chain).named_modules()
        if not list(module.children())
    ]
    solid = [place for place, (_, module) in enumerate(layers) if not isinstance(module, (*_ELEMENTWISE, *_NORMS))]
    best: list[tuple[int, list[Pair]]] = [(0, []), (0, [])]
    for before, here in itertools.pairwise(solid):
        (first, one), (second, other) = layers[before], layers[here]
        norms = [(name, module) for name, module in layers[before + 1 : here] if isinstance(module, _NORMS)]
        are_own = all(holders[tensor] == 1 for module in (one, other) for tensor in module.parameters())
        taken = best[-1]
        if are_own and _fit(one, [module for _, module in norms], other, count):
            size = one.weight.numel() + other.weight.numel()
            weight, pairs = best[-2]
            taken = max(taken, (weight + size, [*pairs, Pair(first, [name for name, _ in norms], second)]))
        best.append(taken)
    yield from best[-1][1]


def _fit(one: Any, norms: Sequence[Any], other: Any, count: int) -> bool:
    kinds = [next((kind for of, kind, _ in _DIMS if isinstance(module, of)), None) for module in (one, other)]
    if None in kinds or kinds[0] != kinds[1] or any(getattr(module, "groups", 1) != 1 for module in (one, other)):
        return False
    width = one.weight.shape[_dims(one)[0]]
    widths = [other.weight.shape[_dims(other)[1]], *(norm.num_features for norm in norms)]
    return bool(width >= count and all(width == found for found in widths))


def _split_norm(norm: Any, name: str, group: World) -> dict[str, Cut]:
    """Keep of a BatchNorm this rank's channels, of which each is normalized by itself. Mutates it."""
    cut = Cut.of(0, norm.num_features, group)
    norm.num_features = cut.stop - cut.start
    found = {}
    for key, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        if tensor.dim():  # num_batches_tracked is a number.
            setattr(norm, key, _cut(tensor, cut) if isinstance(tensor, nn.Parameter) else cut.of_whole(tensor).clone())
            found[f"{name}.{key}"] = cut
    return found


def _dims(layer: nn.Module) -> tuple[int, int]:
    return next(dims for of, _, dims in _DIMS if isinstance(layer, of))


def _cut(parameter: Any, cut: Cut) -> nn.Parameter:
    kept = cut.of_whole(parameter.detach()).clone(memory_format=torch.preserve_format)
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _empty(layer: Any) -> None:
    """Let go of the whole weight: the part has taken its place."""
    nothing = torch.empty(0)
    layer.weight = nn.Parameter(nothing, requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(nothing, requires_grad=False)
