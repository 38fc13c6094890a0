"""A torch optimizer that does not speak to a profiler that is not there.

torch opens a record for its profiler around every `step` and `zero_grad`: 40 us each with code and tables gone from
the caches after a backward pass, which is 1% of a step of a 784-400-20 MLP.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


class QuietOptimizer(Optimizer):
    """As Optimizer; hooks are called, and records made, where there are any to call and somebody to read them."""

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """As torch's, which wraps `step` in these."""
        told = Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: "QuietOptimizer", *args: Any, **kwargs: Any) -> Any:
            hooks = (
                self._optimizer_step_pre_hooks,
                self._optimizer_step_post_hooks,
                _global_optimizer_pre_hooks,
                _global_optimizer_post_hooks,
            )
            take = told if any(hooks) or _profiler_enabled() else func
            return take(self, *args, **kwargs)

        return step

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Local."""
        if not set_to_none or _profiler_enabled():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
