"""What a stage's forward and backward need in memory, from one micro-batch of tensors without numbers.

torch's fake tensors go through the stage's own code; every storage that is made on the way is noted, and when it goes.
"""

import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvdvae.allocator import LARGEST_KEPT

Payload = tuple[Tensor, ...]


class Needs(NamedTuple):
    """Bytes of one micro-batch."""

    received: int
    """Its inputs, where another stage sends them."""
    kept: int
    """Between forward and backward, inputs not counted."""
    passing: int
    """Beside what is kept, for a moment of forward or backward; gradients of parameters not counted."""


class Alive(TorchDispatchMode):
    """Inside, notes the storages that operations make, and when they are freed."""

    def __init__(self, known: list[Tensor]) -> None:
        """`known`: tensors whose storages count elsewhere."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {_key(tensor) for tensor in known}
        self._events: list[tuple[int, int]] = []
        """Storage, and bytes: more than none where it is made, less where it is freed."""
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on."""
        key, storage = _key(tensor), tensor.untyped_storage()
        if key not in self._known and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._events.append((key, storage.nbytes()))
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._events.append((key, -self._sizes.pop(key)))

    @property
    def now(self) -> int:
        """Bytes at this moment."""
        return sum(nbytes for _, nbytes in self._events)

    def peak(self, without: list[Tensor]) -> int:
        """The most bytes, `without` what these tensors, which are still there, have.

        malloc keeps small blocks when they are freed and returns large ones, so the most of either is needed.
        """
        left_out = {_key(tensor) for tensor in without}
        made = {key: number for number, (key, nbytes) in enumerate(self._events) if nbytes > 0 and key in left_out}
        # Before, another storage may have been at the address.
        events = [n for number, (key, n) in enumerate(self._events) if number < made.get(key, len(self._events))]
        small = [nbytes for nbytes in events if abs(nbytes) < LARGEST_KEPT]
        large = [nbytes for nbytes in events if abs(nbytes) >= LARGEST_KEPT]
        return sum(max(accumulate(some), default=0) for some in (small, large))


def needs(
    stage: nn.Module, inputs: Payload, batch: Tensor, is_first: bool, forward: Callable[[Payload], Payload]
) -> Needs:
    """Run a stage once on a micro-batch. Mutates the gradients of `stage`, which must be of fake tensors.

    `inputs`: its first step's. `forward`: of all its steps, with the loss for a result where it is the last one.
    """
    received = 0 if is_first else sum(tensor.nbytes for tensor in inputs)
    inputs = tuple(tensor.detach().requires_grad_(not is_first) for tensor in inputs)
    with Alive([*stage.parameters(), *stage.buffers(), *inputs, batch]) as alive:
        outputs = [tensor for tensor in forward(inputs) if tensor.requires_grad]
        kept = alive.now
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    trained = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
    return Needs(received, kept, alive.peak(trained) - kept)


def _key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
