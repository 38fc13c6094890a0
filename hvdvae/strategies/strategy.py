"""What all strategies are: a torch optimizer over flat vectors, with one hole, `exchange`.

A strategy says what happens to the gradient vector between backward() and the step. Everything that users do with
optimizers (schedules, clipping, AMP, state_dict, zero_grad) works on it as on any torch optimizer. Here is the step.
Below it: what a run asks besides (run_member.py), what ranks hold alike (common_model.py), what is saved
(saved_optimizer.py).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdvae.errors import ConfigError
from hvdvae.flat import FlatModel
from hvdvae.strategies.checkpointed import checkpoint, restore
from hvdvae.strategies.equal_options import EqualOptions
from hvdvae.strategies.flat_optimizer import check_supported, flat_optimizer, is_elementwise
from hvdvae.strategies.gradient_hooks import release
from hvdvae.strategies.group_options import CountedOptions
from hvdvae.strategies.horovod_start import begin_state, steps_for_horovod
from hvdvae.strategies.left_alone import left_alone
from hvdvae.strategies.optimizer_state import entries_of, follow, load_state
from hvdvae.strategies.own_step import NotFinite, check_arguments, check_first_order, reach, with_closure
from hvdvae.strategies.passes import Passes
from hvdvae.strategies.run_member import RunMember
from hvdvae.strategies.same_model import check_device, check_same_model, check_same_optimizer, summary
from hvdvae.strategies.traffic import Traffic
from hvdvae.strategies.wrapped import Wrapped
from hvdvae.world import World


class Strategy(RunMember):
    """An optimizer whose step is taken together with the other ranks. Build with `DistributedOptimizer`."""

    part = slice(None)
    """What this rank steps of the parameter vector."""
    steps_whole = True
    """Whether a rank's optimizer is over all of the vectors."""
    averages_gradients = True
    """Whether the gradient of a step is the mean over all ranks."""
    takes_closures = True
    """Whether a step may be of several gradients, as often as an optimizer evaluates its closure."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        world: World,
        *,
        backward_passes_per_step: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        """Make the model's parameters views of one vector and give every rank those of rank 0.

        Mutates the model's storage; keeps the state that `optimizer` has. Blocks; every rank must call it. The
        gradient of a step is the mean over ranks and backward passes, its global norm clipped at `clip_norm`. Raises
        WorldError where ranks hold different models or optimizers.
        """
        if not isinstance(backward_passes_per_step, int) or backward_passes_per_step < 1:
            raise ConfigError(
                f"backward_passes_per_step is {backward_passes_per_step!r}, expected a whole number of at least 1"
            )
        if clip_norm is not None and not (isinstance(clip_norm, int | float) and clip_norm > 0):
            raise ConfigError(f"clip_norm (--clip-norm) is {clip_norm!r}, expected a number above 0, or none")
        check_supported(optimizer)
        self.world, self.model = world, model
        self._asked = Wrapped(optimizer)
        self.numbers = self._asked.numbers
        self.flat = FlatModel(model, self._asked.trained)
        release(self.flat.tensors)
        check_device(self.flat, world)
        self.own = [slice(0, self.flat.parameters.numel())]
        """Of the vectors, what this rank answers for in the global norm."""
        self.backward_passes_per_step = backward_passes_per_step
        self._passes = Passes(backward_passes_per_step, self.flat.tensors)
        self.clip_norm = clip_norm
        self.moved = Traffic()
        """Counted so far, also before a resume."""
        self.skipped_steps = 0
        self.gradient_norm = 0.0
        self.equal_options = EqualOptions(optimizer.defaults)
        self._exchanged = False
        self.arguments: dict[str, Any] = {}
        """Of the user's, for the step of an optimizer that steps itself."""
        self._kept_buffers = False
        """Whether they have been kept since the last step."""
        self._poison: Tensor | None = None
        self._step_supports_amp_scaling = True  # Then GradScaler always calls `step`, on all ranks.
        saved = optimizer.state_dict() if optimizer.state else None
        mine = summary(optimizer) if self.synchronous else ""
        # LR schedulers that are built already hold `optimizer`: its groups stay the ones that rule.
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups
        self._wrapped = optimizer
        self.wrapped_class = type(optimizer).__name__
        self.inner = flat_optimizer(optimizer, self.flat)
        self._is_flat = is_elementwise(optimizer)
        self.counted = CountedOptions()
        """Those that steps of a class of others change: they are state, and not the user's."""
        if self._is_flat:  # Else the optimizer itself calls them.
            self._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
            self._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks
        if self.steps_whole:
            self.follow_gradient()
        if saved is not None and self._is_flat:
            groups, entries = saved["param_groups"], entries_of(saved["state"])
            load_state(optimizer, self.inner, self.flat, self.numbers, groups, entries)
            optimizer.state.clear()  # It has been copied, and Adagrad's is there before the first step.
        check_same_model(self.flat, world, self.peers)
        check_same_optimizer(mine, world, self.peers)
        self.keep_states()
        self.broadcast_model()
        self.flat.keep_buffers()

    def follow_gradient(self) -> None:
        """Point the inner optimizer at the gradient vector, after it was moved. Local."""
        if self._is_flat:
            for group, part in zip(self.inner.param_groups, self.flat.group_slices, strict=True):
                group["params"][0].grad = self.flat.gradient[part]

    def follow_parameters(self) -> None:
        """Point the inner optimizer at the parameter vector, after it was moved. Local."""
        for group, part in zip(self.inner.param_groups, self.flat.group_slices, strict=True):
            group["params"][0].data = self.flat.parameters[part]

    @abstractmethod
    def exchange(self, gradient: Tensor) -> None:
        """Turn this rank's gradient (P,), in place, into the mean over ranks. Blocks; every rank must call it."""

    def watch(self, loss: Tensor) -> None:
        """Skip the coming step, on all ranks, if this loss is not finite. Local; costs no synchronization with a GPU.

        Zero times the loss is added to the gradient: nothing if it is finite, NaN if not, and the exchange carries it
        on.
        """
        if loss.device.type == "cpu" and _is_finite(loss.item()):
            return
        poison = loss.detach() * 0
        self._poison = poison if self._poison is None else self._poison + poison

    def synchronize(self) -> None:
        """Exchange gradients now, so that `.grad` holds the mean over ranks (to clip or unscale them before `step`).

        Blocks; every rank must call it, after the last backward() of the step: what a later one adds is not averaged.
        `step` calls it unless it was called since the last step. Call it before GradScaler's `unscale_` and `step`:
        whether a gradient overflowed is then the same on all ranks.
        """
        self._exchange_once()

    def _exchange_once(self) -> None:
        if self._exchanged:
            return
        if not self._is_flat:
            check_first_order(self._wrapped, self.flat.tensors)
        gradient = self.flat.gather_gradient()
        if self._poison is not None:
            gradient[:1].add_(self._poison)
            self._poison = None
        if self.backward_passes_per_step > 1:
            gradient.div_(self.mean_passes())
        self.exchange(gradient)
        self._exchanged = True

    def mean_passes(self) -> float:
        """Backward passes that the gradient of the coming step is of, on the mean over the ranks that average it.

        What is divided by it counts each pass alike, also where ranks have made different numbers of them. Blocks
        where passes are accumulated; every rank must call it.
        """
        if self.backward_passes_per_step == 1 or self.is_told_the_passes:
            return self.backward_passes_per_step
        made = float(self._passes.made)
        if self.averages_gradients and self.world.size > 1:
            made = float(self._sum(torch.tensor([made], dtype=torch.float64), "passes of a step")) / len(self.peers)
        # Of gradients that were set by hand nobody knows.
        return made or self.backward_passes_per_step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **arguments: Any) -> Any:
        """Exchange gradients and update the parameters. Blocks; every rank must call it.

        Where any rank's gradient is not finite, no rank steps and `skipped_steps` counts one: the exchange has
        carried the NaN or infinity to all, so that all decide alike. Buffers are then again what they were at the last
        `zero_grad`, or before it where that came after a forward pass that spoiled them; in a loop without, what they
        were after the last step that was taken.

        An optimizer that steps itself (not of torch's elementwise ones) gets `arguments`, and evaluates the closure
        itself, as often as it wants: each time gradients are exchanged, and it is given the mean loss over ranks.
        Returns the closure's last loss, this rank's.
        """
        check_arguments(self._wrapped, arguments, steps_itself=not self._is_flat)
        if not any(self.stateful.state.values()) and steps_for_horovod():
            self.begin_state()
            return None
        loss, evaluates = None, closure is not None and not self._is_flat
        if closure is not None and not evaluates:
            with torch.enable_grad():
                loss = closure()
        try:
            # Some want a gradient before they evaluate the closure (SAM); others find the last step's.
            if not evaluates or self.flat.has_new_gradients(was_cleared=self._kept_buffers):
                self._prepare()
            if closure is not None and evaluates:
                loss = with_closure(self, closure, arguments, self._prepare)
            else:
                self.arguments = arguments
                self.update()
        except NotFinite:
            self.skipped_steps += 1
            # The forward pass of what is skipped has left its mark on statistics (BatchNorm).
            self.flat.restore_buffers()
            self.skip()
            self._count_step()
            return loss
        finally:
            self.arguments = {}
        if self.parts is not None:
            self.parts.level(self.flat)
        self.flat.count_change()  # Else a graph that was computed before would give a wrong gradient.
        # A scheduler that was built on the wrapped optimizer asks it whether it has stepped.
        self._wrapped._opt_called = True  # type: ignore[attr-defined]
        # Of a loop that has the model clear its gradients, not the optimizer; or where another optimizer may skip next.
        if not self._kept_buffers or self.flat.shares_buffers:
            self.flat.keep_buffers()
        self._kept_buffers = False
        self._count_step()
        return loss

    def _prepare(self) -> None:
        """Have the gradient as it is to be stepped on. Blocks; every rank must call it. Raises NotFinite on all."""
        self.flat.take_back()
        self.take_writes()
        self._asked.check()
        if self._exchanged:
            self.flat.gather_gradient()  # Somebody may have assigned other gradients since.
        elif self.world.size > 1 and getattr(self, "found_inf", None) is not None:
            raise ConfigError(
                "GradScaler.step was called before the gradients were exchanged, so ranks would disagree on overflows: "
                "call optimizer.synchronize() after backward(), then scaler.unscale_ or scaler.step"
            )
        else:
            self._exchange_once()
        self._exchanged = False
        self._passes.clear()
        gradient = self.flat.gradient
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            gradient.div_(scale)  # GradScaler.step without unscale_ leaves that to the optimizer.
        squares = self.squared_norm(gradient)
        self.gradient_norm = (squares if self.parts is None else self.parts.total(squares)) ** 0.5
        if self.parts is not None:
            self.parts.commit()
        follow(self.param_groups, self.inner)
        self.compare_options()
        if not _is_finite(self.gradient_norm):
            raise NotFinite
        if self.clip_norm is not None and self.gradient_norm > self.clip_norm:
            self.flat.gradient[self.part].mul_(self.clip_norm / self.gradient_norm)

    def mean_loss(self, loss: Any) -> Any:
        """What an optimizer that evaluates a closure is given: the mean over ranks that average gradients. Blocks."""
        if loss is None or not self.averages_gradients or self.world.size == 1:
            return loss
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        mean = float(self._sum(torch.tensor([value], dtype=torch.float64), "mean loss")) / len(self.peers)
        return loss.detach().clone().fill_(mean) if isinstance(loss, Tensor) else mean

    def check_exchanged(self, what: str) -> None:
        """Raises ConfigError where a method of the wrapped optimizer would see this rank's own gradients. Local."""
        if self._exchanged or self.world.size == 1 or not self.averages_gradients:
            return
        if self.flat.has_new_gradients(was_cleared=self._kept_buffers):
            raise ConfigError(
                f"{what} between backward and step would see this rank's own gradients: call optimizer.synchronize() "
                "on all ranks first; if it needs no gradients, call it after the step"
            )

    def follow_own_step(self) -> None:
        """Notice what a method of the wrapped optimizer has done to parameters and gradients. Local."""
        self.flat.take_back()
        # SAM clears them between its two steps: what comes then is to be exchanged.
        self._exchanged = self._exchanged and not self.flat.has_lost_gradients()

    if not TYPE_CHECKING:  # Else any attribute would do.

        def __getattr__(self, name: str) -> Any:
            """Attributes and methods of the wrapped optimizer's class that torch's have not (train, eval, ...)."""
            wrapped = self.__dict__.get("_wrapped")
            if wrapped is None or name.startswith("_"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return reach(self, wrapped, name)

    def compare_options(self) -> None:
        """Now and then: raises ConfigError on all ranks where options of ranks that step together differ. May block."""
        if self.synchronous and self.world.size > 1 and self.equal_options.due():
            sum_ = partial(self._sum, what="comparison of options")
            frozen = self.flat.frozen
            self.equal_options.compare(self.param_groups, self.world, sum_, ranks=self.peers, frozen=frozen)

    def _sum(self, numbers: Tensor, what: str) -> Tensor:
        """Replace a few numbers by their sum over the ranks that train together. Blocks; every rank must call it."""
        return self.world.sum_(numbers, what) if len(self.peers) == self.world.size else self.sum_(numbers)

    def _count_step(self) -> None:
        if not self.is_told_the_step:
            self.world.watchdog.step += 1

    def squared_norm(self, gradient: Tensor) -> float:
        """Of the mean gradient, which `gradient` (P,) holds after the exchange. The same on all ranks."""
        # One pass of BLAS; a third quicker than vector_norm. Not finite beyond 1e19, where no step is worth taking.
        return sum(float(torch.dot(gradient[place], gradient[place])) for place in self.own)

    def begin_state(self) -> None:
        """Let the optimizer have the state that it begins with, where this rank has any. Local."""
        with self.guard.open():
            begin_state(self.stateful, self.flat.parameters, is_flat=self._is_flat)

    def update(self) -> None:
        """Step the inner optimizer on the vectors. Local."""
        self.step_inner()

    def step_inner(self) -> None:
        """Step the inner optimizer; a parameter that was frozen after wrapping, and has no gradient, stays. Local."""
        if not self._is_flat:  # It sees for itself what is frozen.
            with self.guard.open():
                self.counted.step(self.inner, **self.arguments)
            self.flat.take_back()  # Some set `.data` (SAM).
        elif not self.flat.frozen:
            self.inner.step()
        else:
            places = [*self.flat.places().values()]
            with left_alone(self.inner, self.inner_places, [places[number] for number in self.flat.frozen]):
                self.inner.step()

    @property
    def inner_places(self) -> list[slice]:
        """What the inner optimizer has of the parameter vector, one vector a group."""
        return self.flat.group_slices

    def skip(self) -> None:
        """In place of `update`, where the gradient is not finite."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; forgets an exchange that was not stepped."""
        self._exchanged = False
        self._passes.clear()
        self._poison = None
        self.flat.follow_model()
        self.flat.keep_buffers()
        self._kept_buffers = True
        super().zero_grad(set_to_none)

    def checkpoint(self, **own: Any) -> dict[str, Any] | None:
        """All that a loop needs to continue, as a plain dict on the host; on rank 0, None on the others.

        Blocks; every rank must call it, between two steps (of ps worker 0's call counts, the others return at once).
        `own`: what else the loop wants back from `restore`, on all ranks: its step, a schedule's state_dict.
        `torch.save` takes the dict, and `torch.load(weights_only=True)` gives it back. Rank 0 holds weights and the
        whole optimizer's state in it for as long as you keep it. "model" loads into the model, "optimizer" into the
        plain torch optimizer. local-sgd, diloco, adasum and codecs that remember average over ranks what each has of
        its own, and the run goes on with the mean: what is restored continues it bit for bit at the same size. Random
        generators and the place in the data are the loop's. Raises ConfigError where ranks hold parts of a model, or
        for what a checkpoint cannot hold.
        """
        return checkpoint(self, own)

    def restore(self, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Put back what `checkpoint` returned: weights, optimizer, options, statistics, what the strategy remembers.

        Blocks; every rank must call it; rank 0's `state` counts, the others may give None. Returns what `checkpoint`
        got as `own`, on all ranks; None, with nothing changed, where rank 0 gives None. Also at another number of
        ranks, with another strategy, or with other parameters frozen; with ps before the first step. Forgets
        gradients. Raises CheckpointError where model or optimizer are others.
        """
        return restore(self, state)

    def skip_synchronize(self) -> "nullcontext[None]":
        """For loops written for Horovod: `step` never exchanges twice, so there is nothing to skip."""
        return nullcontext()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once wrapped: the vectors are laid out. Raises ConfigError."""
        if hasattr(self, "inner"):
            raise ConfigError("add_param_group after DistributedOptimizer: add all groups first, then wrap")
        super().add_param_group(param_group)


def _is_finite(value: float) -> bool:
    return value - value == 0.0
