"""An optimizer that is wrapped is stepped by its strategy alone; one that is wrapped again carries on.

A notebook's cell that runs twice, or a model some of whose parameters were unfrozen, wraps an optimizer anew. The new
strategy takes the state of the former, which steps no more.
"""

import functools
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.strategies.optimizer_state import Scalars, pack

if TYPE_CHECKING:
    from hvdvae.checkpoint import Piece
    from hvdvae.strategies.strategy import Strategy

P = ParamSpec("P")
_OWNERS: "weakref.WeakKeyDictionary[Optimizer, weakref.ref[Strategy]]" = weakref.WeakKeyDictionary()


class StepGuard:
    """Lets a wrapped optimizer be stepped by its strategy alone."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Replace its `step`. Mutates the optimizer."""
        self._is_open = False
        self._optimizer = weakref.ref(optimizer)
        self._was_patched = "step" in vars(optimizer)  # By a scheduler that was built on it.
        self._before: Any = optimizer.step
        guard = weakref.ref(self)
        step = self._before

        def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            owner = guard()
            if owner is not None and not owner._is_open:
                raise ConfigError(
                    f"step() of the {type(optimizer).__name__} that was wrapped: it would train this rank alone; step "
                    "what DistributedOptimizer returned"
                )
            return step(*args, **kwargs)

        functools.update_wrapper(guarded, step)
        self._guarded = types.MethodType(guarded, optimizer)
        optimizer.step = self._guarded  # type: ignore[method-assign]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the strategy steps it."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def remove(self) -> None:
        """Give it its own step back. Mutates the optimizer."""
        optimizer = self._optimizer()
        self._is_open = True  # For whoever has wrapped the guard.
        if optimizer is not None and vars(optimizer).get("step") is self._guarded:
            if self._was_patched:
                optimizer.step = self._before  # type: ignore[method-assign]
            else:
                del optimizer.step


def carrying_on(build: Callable[P, "Strategy"]) -> Callable[P, "Strategy"]:
    """Let a function that wraps `optimizer` take one that is wrapped already, or its strategy, and carry on."""

    @functools.wraps(build)
    def wrap(*args: P.args, **kwargs: P.kwargs) -> "Strategy":
        given: Any = kwargs.get("optimizer", args[0] if args else None)
        before = _owner(given)
        found = build(*args, **kwargs) if before is None else _wrap_anew(before, build, args, kwargs)
        _OWNERS[found.wrapped] = weakref.ref(found)
        return found

    return wrap


def _owner(given: Any) -> "Strategy | None":
    if hasattr(given, "keep_states"):  # A strategy itself.
        return given  # type: ignore[no-any-return]
    reference = _OWNERS.get(given) if isinstance(given, Optimizer) else None
    return reference() if reference is not None else None


def _wrap_anew(before: "Strategy", build: Callable[..., "Strategy"], args: Any, kwargs: Any) -> "Strategy":
    if before.is_replaced:
        owner = _owner(before.wrapped)
        if owner is not None and owner is not before:
            before = owner
    _check(before, kwargs.get("strategy"))
    plain = before.wrapped
    if "optimizer" in kwargs:
        kwargs = {**kwargs, "optimizer": plain}
    else:
        args = (plain, *args[1:])
    if kwargs.get("world") is None:
        kwargs = {**kwargs, "world": before.world}
    before.take_writes()
    with before.saving():
        pass  # What each rank has of its own is common from here on.
    buffers = before.flat.buffers.clone()
    pieces, scalars = before.pieces() if before.is_flat else ({}, {})
    before.let_go()
    try:
        found = build(*args, **kwargs)
    except BaseException:
        before.hold_again()
        raise
    if pieces or scalars:
        found.load_entries(pack(found.param_groups), _entries(pieces, scalars))
    if found.flat.buffers.shape == buffers.shape:
        found.flat.buffers.copy_(buffers)
        found.flat.keep_buffers()
    found.take_memory(before.memory(), source=f"strategy {before.name!r}")
    found.skipped_steps = before.skipped_steps
    found.moved.count_on(before.moved.counts())
    found.counted.names |= before.counted.names
    return found


def _check(before: "Strategy", strategy: Any) -> None:
    reason = ""
    if before.parts is not None:
        reason = "ranks hold parts of its model"
    elif "ps" in (before.name, strategy):
        reason = "parameter servers meet a worker's optimizer once"
    elif before.precision is not None:
        reason = f"its model's weights are {before.precision} now"
    if reason:
        raise ConfigError(
            f"this optimizer is wrapped already, and {reason}: wrap a new optimizer of a new model, and give it "
            "restore(checkpoint()) of this one"
        )


def _entries(pieces: "dict[str, Piece]", scalars: Scalars) -> Iterator[tuple[int, str, Any]]:
    for number, entries in scalars.items():
        for key, value in entries.items():
            yield int(number), key, value
    for name in sorted(pieces):
        number, _, key = name.partition("/")
        yield int(number), key, pieces[name].get()


def without_state() -> Any:
    """What torch's optimizers begin with."""
    return defaultdict(dict)
