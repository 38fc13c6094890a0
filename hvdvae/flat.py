"""All parameters as views of one vector, all gradients of another, float buffers of a third.

Shapes: P parameters in all, F elements of float buffers in all.
Strategies move these vectors, never lists of tensors: one message, one fused optimizer kernel, slices for shards.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError


class FlatModel:
    """A model whose trained parameters are views of `parameters` (P,), ordered by the optimizer's groups.

    `rest`: what else its state_dict holds (frozen parameters, counters), each where it was.

    Gradients stay where autograd puts them until `gather_gradient` moves them into `gradient` (P,): that is one pass of
    reading and writing (1% of a step of a 784-400-20 MLP), asks nothing of the user's loop (zero_grad may set None),
    and accumulates over backward passes as PyTorch does.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        """Move the storage of the parameters in `groups` and of the model's float buffers. Strides stay.

        Parameters that no group holds are left alone: nobody trains them. Raises ConfigError where the parameters'
        dtypes or devices differ, or where the model has none.
        """
        self.groups = [list(group) for group in groups]
        self.names = _names(model, groups)
        self.tensors: list[nn.Parameter] = [parameter for group in groups for parameter in group]
        self.shapes = [tuple(parameter.shape) for parameter in self.tensors]
        first = _same_kind(self.names, self.tensors)
        self._views: list[Tensor] = []
        """Of `parameters`, one a parameter: where it is, unless somebody has replaced its storage."""
        self.parameters = torch.empty(sum(p.numel() for p in self.tensors), dtype=first.dtype, device=first.device)
        self._gradient: Tensor | None = None
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
        # Statistics are float32 beside weights of less.
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._places = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        self._buffers = _flatten([buffer for buffer in model.buffers() if buffer.dtype == dtype], dtype)
        self._kept: list[Tensor] = []
        in_vectors = {*self.names, *(name for name, buffer in model.named_buffers() if buffer.dtype == dtype)}
        state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        self.rest = [tensor for name, tensor in state.items() if name not in in_vectors]
        self._layout = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state.items()]

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

        Raises ConfigError where that has another shape.
        """
        for module, name, buffer in self._places:
            found = module._buffers.get(name)
            if found is None or found is buffer:
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

    def gather_gradient(self) -> Tensor:
        """Move all gradients into the vector `gradient` (P,) and make each `.grad` a view of it. Idempotent.

        A parameter without a gradient contributes zeros, so that ranks agree on the length.
        """
        whole = self.gradient
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for parameter, view in zip(self.tensors, self._gradient_views, strict=True):
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
            elif gradient is not view:
                targets.append(view)
                sources.append(gradient if gradient.layout == torch.strided else gradient.to_dense())
            parameter.grad = view
        if targets:
            torch._foreach_copy_(targets, sources)
        return whole

    def keep_buffers(self) -> None:
        """Remember all buffers as they are, unless a number in `buffers` is not finite. Local; awaits no GPU."""
        floats = self.buffers
        if not floats.numel():
            return
        buffers = (floats, *self._others())
        if not self._kept:
            self._kept = [buffer.clone() for buffer in buffers]
        is_good = floats.isfinite().all()
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
        return hashlib.sha256(repr([self.names, self._layout]).encode()).hexdigest()


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
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ConfigError(
                f"parameter {name!r} is {tensor.dtype} on {tensor.device}, but {names[0]!r} is {first.dtype} on "
                f"{first.device}: move the whole model to one device and dtype (mixed precision: autocast)"
            )
    return first


def _flatten(buffers: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One vector, of which these are views from now on."""
    if not buffers:
        return torch.empty(0, dtype=dtype)
    vector = torch.empty(sum(buffer.numel() for buffer in buffers), dtype=dtype, device=buffers[0].device)
    start = 0
    for buffer in buffers:
        view = vector[start : start + buffer.numel()].view(buffer.shape)
        view.copy_(buffer)
        buffer.data = view
        start += buffer.numel()
    return vector
