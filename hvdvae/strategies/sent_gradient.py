"""What stands in `.grad` where a gradient has been sent to the rank that keeps it: it says so when it is used.

With None there torch would go on: clip_grad_norm_ would return 0, and clip nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError

_PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "layout",
    "grad_fn",
    "requires_grad",
    "is_leaf",
    "is_sparse",
    "is_cuda",
    "ndim",
)
_ABOUT = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.untyped_storage,
}
"""What it answers as any gradient does."""
_CLEARING = {Tensor.zero_, torch._foreach_zero_}
_DETACHING = {Tensor.requires_grad_, Tensor.detach_}


class SentGradient(Tensor):
    """In the shape of a parameter's gradient, without its numbers. Raises ConfigError where they are wanted."""

    of: str
    """Name of the parameter."""
    is_dropped: bool
    """Whether somebody has set it to zero since it was sent."""

    @classmethod
    def in_place_of(cls, parameter: nn.Parameter, name: str) -> "SentGradient":
        """One for this parameter; takes no memory to speak of."""
        made = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape).as_subclass(cls)
        made.of, made.is_dropped = name, False
        return made

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Name the parameter."""
        return f"SentGradient(of={self.of!r})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer questions about shape and place, let itself be zeroed, and refuse the rest."""
        if func in _ABOUT:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        found = [*_sent([*args, *(kwargs or {}).values()])]
        if func in _CLEARING:
            for gradient in found:
                gradient.is_dropped = True
        if func in _CLEARING or func in _DETACHING:
            return args[0]
        raise ConfigError(
            f"{getattr(func, '__name__', func)} of the gradient of {found[0].of!r}: under --zero-stage 2 gradients are "
            "sent to the ranks that keep them as backward computes them, and .grad has none. To clip, wrap with "
            "clip_norm (--clip-norm); for anything else that reads or changes gradients use --zero-stage 1, or a hook "
            "(parameter.register_hook)"
        )


def _sent(values: Iterable[Any]) -> Iterator[SentGradient]:
    for value in values:
        if isinstance(value, SentGradient):
            yield value
        elif isinstance(value, list | tuple):
            yield from _sent(value)
