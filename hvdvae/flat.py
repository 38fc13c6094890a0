"""All parameters as views of one vector, all gradients of another, float buffers of a third.

Shapes: P parameters in all, F elements of float buffers in all.
Strategies move these vectors, never lists of tensors: one message, one fused optimizer kernel, slices for shards.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hvdvae.errors import ConfigError


class FlatModel:
    """A model whose trained parameters are views of `parameters` (P,), ordered by the optimizer's groups.

    `rest`: what else it holds (frozen parameters, counters), each where it was.

    Gradients stay where autograd puts them until `gather_gradient` moves them into `gradient` (P,): that is one pass of
    reading and writing (1% of a step of a 784-400-20 MLP), asks nothing of the user's loop (zero_grad may set None),
    and accumulates over backward passes as PyTorch does.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        """Move the storage of the parameters in `groups` and of the model's float buffers. Strides stay.

        Parameters that no group holds are left alone: nobody trains them. Raises ConfigError where the parameters'
        dtypes or devices differ, where the model has none, or where two tensors share memory.
        """
        self.groups = [list(group) for group in groups]
        self.names = _names(model, groups)
        self.tensors: list[nn.Parameter] = [parameter for group in groups for parameter in group]
        first = _same_kind(self.names, self.tensors)
        self.shapes = [tuple(parameter.shape) for parameter in self.tensors]
        # Statistics are float32 beside weights of less.
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        named = dict(model.named_buffers())
        moved = {name for name, buffer in named.items() if buffer.dtype == dtype}
        _check_apart({**dict(model.named_parameters()), **named}, {*self.names, *moved})
        self._views: list[Tensor] = []
        """Of `parameters`, one a parameter: where it is, unless somebody has replaced its storage."""
        self.parameters = torch.empty(sum(p.numel() for p in self.tensors), dtype=first.dtype, device=first.device)
        self._gradient: Tensor | None = None
        self.frozen: list[int] = []
        """Parameters, by number, that have neither requires_grad nor a gradient, as of the last gathering."""
        self._gradient_views: list[Tensor] = []
        self.group_slices: list[slice] = []
        start = 0
        with torch.no_grad():
            for group in groups:
                group_start = start
                for parameter in group:
                    view = _view_as(self.parameters, start, parameter)
                    view.copy_(parameter)
                    parameter.data = view
                    self._views.append(view)
                    start += parameter.numel()
                self.group_slices.append(slice(group_start, start))
        self._places = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        self._buffers, self._buffer_views = _flatten([named[name] for name in named if name in moved], dtype)
        for name, buffer in named.items():
            if name not in moved and _is_expanded(buffer):
                # To be written to, as by a broadcast.
                buffer.data = buffer.clone(memory_format=torch.contiguous_format)
        self._kept: list[Tensor] = []
        state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        state |= {name: buffer for name, buffer in named.items() if name not in state}  # Those that are not saved.
        in_vectors = moved.union(self.names)
        self.rest = [tensor for name, tensor in state.items() if name not in in_vectors]
        self.layout = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state.items()]
        """Name, shape and dtype of all that it holds."""

    @property
    def gradient(self) -> Tensor:
        """(P,); made when it is first asked for, since who keeps a part of it never has the whole."""
        if self._gradient is None:
            self.move_gradient(torch.zeros_like(self.parameters))
        assert self._gradient is not None
        return self._gradient

    @property
    def buffers(self) -> Tensor:
        """(F,); what a module has put in the place of a buffer (`self.mean = ...`) is copied into it first.

        So is what another vector has taken, of an optimizer for other parameters of the model. Raises ConfigError where
        a buffer has another shape.
        """
        for module, name, buffer in self._places:
            found = module._buffers.get(name)
            if found is None:
                continue
            view = self._buffer_views.get(buffer)
            if view is not None and buffer.data_ptr() != view.data_ptr():
                view.copy_(buffer)
                buffer.data = view
            if found is buffer:
                continue
            if found.shape != buffer.shape:
                raise ConfigError(
                    f"buffer {name!r} of {type(module).__name__} had shape {tuple(buffer.shape)} when the model was "
                    f"wrapped, and has {tuple(found.shape)} now: keep its shape"
                )
            buffer.copy_(found.detach())
            module._buffers[name] = buffer
        return self._buffers

    def take_back(self) -> None:
        """Copy in what has replaced the storage of parameters since (`p.data = ...`), and let them be views again.

        Raises ConfigError naming a parameter that was moved to another device, or has another dtype or shape.
        """
        for name, parameter, view in zip(self.names, self.tensors, self._views, strict=True):
            if parameter.data_ptr() == view.data_ptr():
                continue
            found, expected = ((t.dtype, t.device, tuple(t.shape)) for t in (parameter, view))
            if found != expected:
                raise ConfigError(
                    f"parameter {name!r} was {expected[0]} {expected[2]} on {expected[1]} when the optimizer was "
                    f"wrapped, and is {found[0]} {found[2]} on {found[1]} now: change the model first, then wrap"
                )
            view.copy_(parameter.data)
            parameter.data = view

    def move_gradient(self, vector: Tensor) -> None:
        """Let `vector` (P,), zeroed, be the gradient from now on. Call it before the first backward()."""
        self._gradient = vector
        self._gradient_views = list(self.views(vector).values())

    def keep_gradient(self, vector: Tensor) -> None:
        """Let `vector`, of any length, be all that is kept of gradients: they are gathered by somebody else. Local."""
        self._gradient = vector
        self._gradient_views = []

    def move_parameters(self, vector: Tensor) -> None:
        """Let `vector` (P,) hold the parameters from now on. Copies them; optimizers over `parameters` must follow."""
        self._views = list(self.views(vector).values())
        vector.copy_(self.parameters)
        self.parameters = vector
        for parameter, view in zip(self.tensors, self._views, strict=True):
            parameter.data = view

    @torch.no_grad()
    def gather_gradient(self) -> Tensor:
        """Move all gradients into the vector `gradient` (P,) and make each `.grad` a view of it. Idempotent.

        A parameter without a gradient contributes zeros, so that ranks agree on the length. A graph that backward was
        asked for (create_graph) is let go.
        """
        whole = self.gradient
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        frozen: list[int] = []
        for number, (parameter, view) in enumerate(zip(self.tensors, self._gradient_views, strict=True)):
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
                if not parameter.requires_grad:
                    frozen.append(number)
                    continue
            elif gradient is not view:
                targets.append(view)
                sources.append(gradient if gradient.layout == torch.strided else gradient.to_dense())
            parameter.grad = view
        if targets:
            torch._foreach_copy_(targets, sources)
        self.frozen = frozen
        return whole

    def keep_buffers(self) -> None:
        """Remember all buffers as they are, unless a number in one is not finite. Local; awaits no GPU."""
        buffers = (self.buffers, *self._others())
        if not self._places:
            return
        if not self._kept:
            self._kept = [buffer.clone() for buffer in buffers]
        is_good = self._buffers.isfinite().all()
        for other in buffers[1:]:
            if other.is_floating_point() or other.is_complex():
                is_good = is_good & other.isfinite().all()
        for kept, buffer in zip(self._kept, buffers, strict=True):
            torch.where(is_good, buffer, kept, out=kept)

    def restore_buffers(self) -> None:
        """Let all buffers be as they were when they were kept last. Local."""
        for buffer, kept in zip((self.buffers, *self._others()), self._kept, strict=False):
            buffer.copy_(kept)

    def _others(self) -> list[Tensor]:
        """Buffers that are not in the vector: counters, say."""
        return [buffer for _, _, buffer in self._places if buffer.dtype != self._buffers.dtype]

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector (P,), by parameter name and in the parameters' shapes."""
        found, start = {}, 0
        for name, like in zip(self.names, self._views, strict=True):
            found[name] = _view_as(vector, start, like)
            start += like.numel()
        return found

    def places(self) -> dict[str, slice]:
        """Where in the vectors each parameter stands, by name."""
        found, start = {}, 0
        for name, parameter in zip(self.names, self.tensors, strict=True):
            found[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
        return found

    def view(self, piece: Tensor, number: int) -> Tensor:
        """A piece of a vector, that of parameter `number`, in its shape."""
        return _view_as(piece, 0, self._views[number])

    def split(self, vector: Tensor, group: int) -> list[Tensor]:
        """Views of a vector that is aligned with one group's slice, one a parameter, in the parameters' shapes."""
        found, start = [], 0
        for parameter in self.groups[group]:
            found.append(_view_as(vector, start, parameter))
            start += parameter.numel()
        return found

    def digest(self) -> str:
        """SHA-256 of names, shapes and dtypes: equal on all ranks that hold the same model and train the same of it."""
        return hashlib.sha256(repr([self.names, self.layout]).encode()).hexdigest()


def _view_as(vector: Tensor, start: int, like: Tensor) -> Tensor:
    part = vector[start : start + like.numel()]
    if like.is_contiguous():
        return part.view(like.shape)
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(like.shape, like.stride())
    return part.view(like.shape)


def _names(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        for parameter in group:
            if parameter not in names:
                raise ConfigError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model: "
                    "build the optimizer from model.parameters(), and wrap both together"
                )
            found.append(names[parameter])
    return found


def _same_kind(names: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        raise ConfigError("the optimizer holds no parameters, expected at least one")
    first = tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        if is_lazy(tensor):
            raise ConfigError(f"parameter {name!r} has no shape yet: run the model once, on any batch, then wrap")
    if first.is_complex():
        raise ConfigError(
            f"parameter {names[0]!r} is {first.dtype}, expected a real one: keep torch.view_as_real of it"
        )
    for name, tensor in zip(names, tensors, strict=True):
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ConfigError(
                f"parameter {name!r} is {tensor.dtype} on {tensor.device}, but {names[0]!r} is {first.dtype} on "
                f"{first.device}: move the whole model to one device and dtype (mixed precision: autocast)"
            )
    return first


def _check_apart(tensors: dict[str, Tensor], moved: set[str]) -> None:
    """Raises ConfigError where one that is moved shares memory with another: each would go its own way."""
    spans = sorted(
        (tensor.untyped_storage().data_ptr(), tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, tensor in tensors.items()
        if not (is_lazy(tensor) or tensor.is_meta) and tensor.numel() and tensor.layout == torch.strided
    )
    end, last = 0, ""
    for _, first, behind, name in spans:
        if first < end and {name, last} & moved:
            raise ConfigError(
                f"{last!r} and {name!r} of the model share memory, and would not once they are moved into vectors: let "
                "both be one Parameter (or buffer), or compute one from the other in forward"
            )
        if behind > end:
            end, last = behind, name


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to behind its last."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in strides)) * tensor.element_size()


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _flatten(buffers: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """One vector, of which these are views from now on, and which each is."""
    views: dict[Tensor, Tensor] = {}
    if not buffers:
        return torch.empty(0, dtype=dtype), views
    vector = torch.empty(sum(buffer.numel() for buffer in buffers), dtype=dtype, device=buffers[0].device)
    start = 0
    for buffer in buffers:
        view = vector[start : start + buffer.numel()].view(buffer.shape)
        view.copy_(buffer)
        buffer.data = view
        views[buffer] = view
        start += buffer.numel()
    return vector, views
