"""All parameters as views of one vector, all gradients of another, float buffers of a third.

Shapes: P elements of the vector of parameters, with the gaps between them; F elements of float buffers in all.
Strategies move these vectors, never lists of tensors: one message, one fused optimizer kernel, slices for shards.
"""

import hashlib
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from hvdvae.errors import ConfigError
from hvdvae.flat_buffers import flat_buffers
from hvdvae.flat_check import check_apart, check_same_kind, names_of
from hvdvae.flat_homes import Homes
from hvdvae.flat_layout import Layout
from hvdvae.flat_views import apart, part_of, shaped


class FlatModel:
    """A model whose trained parameters are parts of `parameters` (P,), ordered by the optimizer's groups.

    `rest`: what else it holds (frozen parameters, counters), each where it was.

    Each parameter begins at a multiple of 64 bytes and has a storage of its own over the vector's memory, so that it
    computes, and is saved, as any other. What lies between two is zero (`layout`).

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
        self.names = names_of(model, groups)
        self.tensors: list[nn.Parameter] = [parameter for group in groups for parameter in group]
        first = check_same_kind(self.names, self.tensors)
        self.shapes = [tuple(parameter.shape) for parameter in self.tensors]
        # Statistics are float32 beside weights of less.
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        named = dict(model.named_buffers())
        moved = {name for name, buffer in named.items() if buffer.dtype == dtype}
        check_apart({**dict(model.named_parameters()), **named}, {*self.names, *moved})
        self.layout = Layout([[p.numel() for p in group] for group in groups], first.element_size())
        self.group_slices = self.layout.groups
        self.parameters = torch.zeros(self.layout.length, dtype=first.dtype, device=first.device)
        self._gradient: Tensor | None = None
        self.frozen: list[int] = []
        """Parameters, by number, that have neither requires_grad nor a gradient, as of the last gathering."""
        self._gradient_views: list[Tensor] = []
        self._views: list[Tensor] = []
        """Of `parameters`, one a parameter: where it is, unless somebody has replaced its storage."""
        with torch.no_grad():
            for parameter, place in zip(self.tensors, self.layout.places, strict=True):
                self._views.append(part_of(self.parameters, place.start, parameter))
                self._views[-1].copy_(parameter)
        self._attach()
        self._homes = Homes(model, dict(zip(self.names, self.tensors, strict=True)))
        self._buffers = flat_buffers(model, dtype)
        state = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        state |= {name: buffer for name, buffer in named.items() if name not in state}  # Those that are not saved.
        in_vectors = moved.union(self.names)
        self.rest = [tensor for name, tensor in state.items() if name not in in_vectors]
        self.contents = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in state.items()]
        """Name, shape and dtype of all that it holds."""
        _ALL.add(self)

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

        Raises ConfigError where a buffer has another shape, or a dtype whose numbers it cannot hold.
        """
        return self._buffers.vector

    @property
    def shares_buffers(self) -> bool:
        """Whether another optimizer has a say in what is kept of them."""
        return self._buffers.is_shared

    def take_back(self) -> None:
        """Copy in what has replaced parameters or their storage since, and let the model have those of the vector.

        (`p.data = ...`, `module.weight = nn.Parameter(...)`, `load_state_dict(assign=True)`.) Local.
        Raises ConfigError naming a parameter that has another device, dtype or shape, or is not in the model any more.
        """
        self.follow_model()
        if self._is_in_place():
            return
        first, behind = self.parameters.data_ptr(), self.parameters.data_ptr() + self.parameters.nbytes
        for number, (name, parameter) in enumerate(zip(self.names, self.tensors, strict=True)):
            address, shape, stride = self._forms[number]
            if (parameter.data_ptr(), parameter.shape, parameter.stride()) == (address, shape, stride):
                continue
            view = part_of(self.parameters, self.layout.places[number].start, self._views[number])
            found, expected = ((t.dtype, t.device, tuple(t.shape)) for t in (parameter, view))
            if found != expected:
                raise ConfigError(
                    f"parameter {name!r} was {expected[0]} {expected[2]} on {expected[1]} when the optimizer was "
                    f"wrapped, and is {found[0]} {found[2]} on {found[1]} now: change the model first, then wrap"
                )
            if first <= parameter.data_ptr() < behind and parameter.data_ptr() != address:
                raise ConfigError(
                    f"parameter {name!r} was given the memory of another (`.data = other.data`), and both are trained: "
                    "copy its values (`.data.copy_(other)`), or let both be one Parameter before the optimizer is built"
                )
            self._views[number] = view
            view.copy_(parameter.data.clone())  # It may lie there in another order.
        self._attach()

    def follow_model(self) -> None:
        """Of `take_back`, what concerns modules whose parameters were replaced as a whole. Microseconds. Local."""
        if self._homes.changed():
            others = [tensor for flat in list(_ALL) if flat is not self for tensor in flat.tensors]
            before = [parameter.grad for parameter in self.tensors]
            self._homes.follow(others)
            if self._gradient is not None and not self._gradient_views:
                self._check_gradients(before)

    def publish(self) -> None:
        """Let the model show what was written into `parameters`, and autograd know of it. Local.

        Whatever has replaced a parameter's storage since is let go. A graph that was computed before raises in its
        backward pass, as after any change in place.
        """
        if not self._is_in_place():
            self._attach()
        self.count_change()

    def count_change(self) -> None:
        """Of `publish`, what concerns autograd: versions of parameters that are where they belong. Microseconds."""
        increment_version(self.tensors)

    def _attach(self) -> None:
        for parameter, view in zip(self.tensors, self._views, strict=True):
            parameter.data = view
        self._forms = [(p.data_ptr(), p.shape, p.stride()) for p in self.tensors]
        self._addresses, self._strides = [f[0] for f in self._forms], [f[2] for f in self._forms]
        self._shapes = [f[1] for f in self._forms]

    def _is_in_place(self) -> bool:
        tensors = self.tensors
        return (
            [parameter.data_ptr() for parameter in tensors] == self._addresses
            and [parameter.shape for parameter in tensors] == self._shapes
            and [parameter.stride() for parameter in tensors] == self._strides
        )

    def _check_gradients(self, before: Sequence[Tensor | None]) -> None:
        """Raises ConfigError where a gradient came to a parameter's replacement that was to be taken as it came."""
        for name, parameter, gradient in zip(self.names, self.tensors, before, strict=True):
            if parameter.grad is not gradient:
                raise ConfigError(
                    f"parameter {name!r} was replaced (as by load_state_dict(assign=True)) after zero_grad(), and its "
                    "gradient went past --zero-stage 2: replace it before zero_grad(), or copy its values"
                )

    def move_gradient(self, vector: Tensor) -> None:
        """Let `vector` (P,), zeroed, be the gradient from now on. Call it before the first backward()."""
        self._gradient = vector
        self._gradient_views = list(map(apart, self.views(vector).values()))

    def keep_gradient(self, vector: Tensor) -> None:
        """Let `vector`, of any length, be all that is kept of gradients: they are gathered by somebody else. Local."""
        self._gradient = vector
        self._gradient_views = []

    def move_parameters(self, vector: Tensor) -> None:
        """Let `vector` (P,) hold the parameters from now on. Copies them; optimizers over `parameters` must follow."""
        self._views = list(map(apart, self.views(vector).values()))
        vector.copy_(self.parameters)
        self.parameters = vector
        self._attach()

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

    def has_new_gradients(self, *, was_cleared: bool) -> bool:
        """Whether one has come since they were gathered. `was_cleared`: whether all were cleared since. Local."""
        _ = self.gradient  # Asking makes the views, before the first gathering.
        pairs = zip(self.tensors, self._gradient_views, strict=True)
        return any(tensor.grad is not None and (was_cleared or tensor.grad is not view) for tensor, view in pairs)

    def has_lost_gradients(self) -> bool:
        """Whether one was cleared or replaced since they were gathered. Local."""
        _ = self.gradient
        pairs = enumerate(zip(self.tensors, self._gradient_views, strict=True))
        return any(tensor.grad is not view for number, (tensor, view) in pairs if number not in self.frozen)

    def keep_buffers(self) -> None:
        """Remember all buffers as they are, but for modules where one is not finite. Local; awaits no GPU."""
        self._buffers.keep()

    def restore_buffers(self) -> None:
        """Let all buffers be as they were when they were kept last. Local."""
        self._buffers.restore()

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector (P,), by parameter name and in the parameters' shapes."""
        places = self.layout.places
        return {
            name: shaped(vector, place.start, like)
            for name, place, like in zip(self.names, places, self._views, strict=True)
        }

    def places(self) -> dict[str, slice]:
        """Where in the vectors each parameter stands, by name."""
        return dict(zip(self.names, self.layout.places, strict=True))

    def view(self, piece: Tensor, number: int) -> Tensor:
        """A piece of a vector, that of parameter `number`, in its shape."""
        return shaped(piece, 0, self._views[number])

    def split(self, vector: Tensor, group: int) -> list[Tensor]:
        """Views of a vector that is aligned with one group's slice, one a parameter, in the parameters' shapes."""
        first = sum(map(len, self.groups[:group]))
        start = self.group_slices[group].start
        return [
            shaped(vector, self.layout.places[number].start - start, self._views[number])
            for number in range(first, first + len(self.groups[group]))
        ]

    def digest(self) -> str:
        """SHA-256 of names, shapes and dtypes: equal on all ranks that hold the same model and train the same of it."""
        return hashlib.sha256(repr([self.names, self.contents]).encode()).hexdigest()


_ALL: "weakref.WeakSet[FlatModel]" = weakref.WeakSet()
