"""Float buffers of a model as one vector, and what all its buffers were when a step was last taken.

Shapes: F elements of float buffers in all.
Optimizers of one model share this: a step that one of them takes confirms all that forward passes have left until then,
and what another has to skip does not undo it.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from hvdvae.errors import ConfigError
from hvdvae.flat_views import apart


class _Home:
    """Where a module has a buffer."""

    def __init__(self, path: str, module: nn.Module, name: str, buffer: Tensor) -> None:
        self.path, self.held, self.name, self.buffer = path, module._buffers, name, buffer
        self.kind = type(module).__name__
        self.view: Tensor | None = None
        """Of the vector, where it is in it."""
        self.address = 0

    def move(self, view: Tensor) -> None:
        self.buffer.data = self.view = view
        self.address = view.data_ptr()


class FlatBuffers:
    """The buffers of one model. `flat_buffers` gives all optimizers of it the same."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Move those of this dtype into a vector. Mutates the model's storage."""
        self._homes = [
            _Home(f"{path}.{name}" if path else name, module, name, buffer)
            for path, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        self._dtype = dtype
        named = dict(model.named_buffers())
        self.moved = {name for name, buffer in named.items() if buffer.dtype == dtype}
        """Names of those in the vector."""
        self._vector = _flatten([named[name] for name in named if name in self.moved], dtype, self._homes)
        devices = [self._vector.device] if self.moved else [home.buffer.device for home in self._homes]
        self._device = devices[0] if devices else torch.device("cpu")
        for name, buffer in named.items():
            if name not in self.moved and _is_expanded(buffer):
                # To be written to, as by a broadcast.
                buffer.data = buffer.clone(memory_format=torch.contiguous_format)
        self._others = [home.buffer for home in self._homes if home.view is None]
        self._kept: list[Tensor] = []
        self._owner, self._owners_of_others, self._modules = self._owners()
        self._users = 0
        self._relatives: list[weakref.ref[FlatBuffers]] = []
        """Of models that hold some of these buffers, too."""

    @property
    def vector(self) -> Tensor:
        """(F,); what a module has put in the place of a buffer (`self.mean = ...`) is copied into it first.

        So is what another vector has taken, of an optimizer for another part of the model. Raises ConfigError where a
        buffer has another shape, or a dtype whose numbers it cannot hold.
        """
        for home in self._homes:
            found, buffer = home.held.get(home.name), home.buffer
            if found is None:
                continue
            if home.view is not None and buffer.data_ptr() != home.address:
                _check(home, buffer, home.view)
                home.view.copy_(buffer)
                home.move(home.view)
            if found is not buffer:
                _check(home, found, buffer)
                buffer.copy_(found.detach())
                home.held[home.name] = buffer
        return self._vector

    @property
    def is_shared(self) -> bool:
        """Whether several optimizers have a say in what is kept."""
        return self._users > 1 or any(reference() is not None for reference in self._relatives)

    def keep(self) -> None:
        """Remember all as they are, but for modules in which a number is not finite that was. Local; awaits no GPU."""
        self._keep()
        for reference in self._relatives:
            other = reference()
            if other is not None:
                other._keep()

    def restore(self) -> None:
        """Let all be as they were when they were kept last. Local."""
        buffers = (self.vector, *self._others)
        for buffer, kept in zip(buffers, self._kept, strict=False):
            buffer.copy_(kept)
        increment_version([home.buffer for home in self._homes])

    def fits(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """Whether these are still the buffers of that model."""
        mine = [(home.path, id(home.held), home.buffer) for home in self._homes]
        theirs = [
            (f"{path}.{name}" if path else name, id(module._buffers), buffer)
            for path, module in model.named_modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        return (
            dtype == self._dtype
            and len(mine) == len(theirs)
            and all(
                (path, held) == (other_path, other_held) and _form(buffer) == _form(other)
                for (path, held, buffer), (other_path, other_held, other) in zip(mine, theirs, strict=True)
            )
        )

    def count_user(self) -> None:
        """One more optimizer is of this model. Local."""
        self._users += 1

    def relate(self, others: Sequence["FlatBuffers"]) -> None:
        """Let those that hold some of these buffers hear of what is kept, and the other way. Local."""
        mine = {id(home.buffer) for home in self._homes}
        for other in others:
            if other is not self and not mine.isdisjoint(id(home.buffer) for home in other._homes):
                self._relatives.append(weakref.ref(other))
                other._relatives.append(weakref.ref(self))

    def _keep(self) -> None:
        if not self._homes:
            return
        vector = self.vector
        if not self._kept:
            self._kept = [buffer.clone() for buffer in (vector, *self._others)]
            return
        kept, *others = self._kept
        spoiled = kept.isfinite() & ~vector.isfinite()
        pairs = list(zip(others, self._others, self._owners_of_others, strict=True))
        floats = [(k, b, owner) for k, b, owner in pairs if b.is_floating_point() or b.is_complex()]
        if vector.device.type == "cpu" and not floats and not bool(spoiled.any()):
            kept.copy_(vector)
            for k, buffer, _ in pairs:
                k.copy_(buffer)
            return
        count = torch.zeros(self._modules, dtype=torch.int32, device=self._device)
        count.index_add_(0, self._owner, spoiled.int())
        for k, buffer, owner in floats:
            count[owner] += (k.isfinite() & ~buffer.isfinite()).any().to(self._device)
        is_good = count == 0
        torch.where(is_good[self._owner], vector, kept, out=kept)
        for k, buffer, owner in pairs:
            torch.where(is_good[owner].to(buffer.device), buffer, k, out=k)

    def _owners(self) -> tuple[Tensor, list[int], int]:
        """Numbers of the modules: of each element of the vector, of each other buffer, and how many there are."""
        numbers: dict[int, int] = {}
        spans: dict[int, tuple[int, int]] = {}
        others = []
        for home in self._homes:
            number = numbers.setdefault(id(home.held), len(numbers))
            if home.view is None:
                others.append(number)
            else:
                spans.setdefault(home.address, (number, home.view.numel()))
        # In the order of the vector, which that of addresses is.
        found = [torch.full((count,), number) for _, (number, count) in sorted(spans.items())]
        whole = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
        return whole.to(self._device), others, len(numbers)


_OF_MODELS: "weakref.WeakKeyDictionary[nn.Module, FlatBuffers]" = weakref.WeakKeyDictionary()


def flat_buffers(model: nn.Module, dtype: torch.dtype) -> FlatBuffers:
    """Those of a model, the same for all optimizers of it. Mutates the model's storage."""
    found = _OF_MODELS.get(model)
    if found is None or not found.fits(model, dtype):
        found = FlatBuffers(model, dtype)
        found.relate(list(_OF_MODELS.values()))
        _OF_MODELS[model] = found
    found.count_user()
    return found


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _check(home: _Home, found: Tensor, buffer: Tensor) -> None:
    """Raises ConfigError where what a module has put in a buffer's place does not go into it."""
    if found.shape != buffer.shape:
        raise ConfigError(
            f"buffer {home.path!r} of {home.kind} had shape {tuple(buffer.shape)} when the model was wrapped, and has "
            f"{tuple(found.shape)} now: keep its shape"
        )
    if torch.promote_types(found.dtype, buffer.dtype) != buffer.dtype:
        raise ConfigError(
            f"buffer {home.path!r} of {home.kind} was {buffer.dtype} when the model was wrapped, and was assigned "
            f"{found.dtype} since, whose numbers it cannot hold: register it as {found.dtype}, or assign "
            f"`.to({buffer.dtype})` of it"
        )


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _flatten(buffers: Sequence[Tensor], dtype: torch.dtype, homes: Sequence[_Home]) -> Tensor:
    """One vector, of which these are parts from now on."""
    if not buffers:
        return torch.empty(0, dtype=dtype)
    vector = torch.empty(sum(buffer.numel() for buffer in buffers), dtype=dtype, device=buffers[0].device)
    of_buffer: dict[int, list[_Home]] = {}
    for home in homes:
        of_buffer.setdefault(id(home.buffer), []).append(home)
    start = 0
    for buffer in buffers:
        view = apart(vector[start : start + buffer.numel()].view(buffer.shape))
        view.copy_(buffer)
        for home in of_buffer[id(buffer)]:
            home.move(view)
        start += buffer.numel()
    return vector
