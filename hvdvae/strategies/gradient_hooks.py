"""Functions that autograd calls as gradients of a model's parameters are ready, as long as somebody wants them.

A model that is wrapped anew calls the new optimizer's alone: one that was dropped would take gradients away from it.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

_HANDLES: dict[int, tuple["weakref.ref[nn.Parameter]", list[Any]]] = {}
"""What takes the functions off again, by the parameter's id."""


def call_after(tensors: Sequence[nn.Parameter], owner: Any, function: Callable[[Any, int, Tensor], None]) -> None:
    """Call `function(owner, number, parameter)` once a gradient is in `.grad`, while the owner lives. Local."""
    reference = weakref.ref(owner)
    for number, tensor in enumerate(tensors):

        def after(parameter: Tensor, number: int = number) -> None:
            found = reference()
            if found is not None:
                function(found, number, parameter)

        _keep(tensor, tensor.register_post_accumulate_grad_hook(after))  # type: ignore[no-untyped-call]


def call_before(tensors: Sequence[nn.Parameter], owner: Any, function: Callable[[Any, int], None]) -> None:
    """Call `function(owner, number)` before a gradient is added to `.grad`, while the owner lives. Local.

    Also where torch.autograd.grad asks for that parameter's, which goes nowhere.
    """
    reference = weakref.ref(owner)
    for number, tensor in enumerate(tensors):

        def before(gradient: Tensor, number: int = number) -> None:
            found = reference()
            if found is not None:
                function(found, number)

        _keep(tensor, tensor.register_hook(before))  # type: ignore[no-untyped-call]


def release(tensors: Sequence[nn.Parameter]) -> None:
    """Take off what earlier owners had called for these parameters. Local."""
    for tensor in tensors:
        reference, handles = _HANDLES.pop(id(tensor), (None, []))
        if reference is not None and reference() is tensor:
            for handle in handles:
                handle.remove()


def _keep(tensor: nn.Parameter, handle: Any) -> None:
    reference, handles = _HANDLES.get(id(tensor), (None, []))
    if reference is None or reference() is not tensor:
        number = id(tensor)
        handles = []
        _HANDLES[number] = (weakref.ref(tensor, lambda _: _HANDLES.pop(number, None)), handles)
    handles.append(handle)
