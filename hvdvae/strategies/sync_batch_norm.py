"""BatchNorm over the batches of all ranks, on any device and any carrier.

PyTorch's and Horovod's need GPUs. Here the sums travel as one small vector forward and one backward:

    forward   [sum of x, sum of x^2, count]  (2 C + 1)      backward  [sum of dy, sum of dy xhat]  (2 C)

Shapes: B examples, C channels, S spatial positions; input (B, C) or (B, C, ...).
"""

from typing import Any

import torch
from torch import Tensor, nn

from hvdvae.errors import ConfigError
from hvdvae.first_order import refuse_graph
from hvdvae.world import World

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Normalize(torch.autograd.Function):
    """xhat = (x - mean) / sqrt(var + eps) with the mean and variance of all ranks' x (Ioffe & Szegedy 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, count: float, world: World) -> Tensor:
        shape = (1, -1, *([1] * (x.dim() - 2)))
        normalized = (x - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalized, scale)
        ctx.count, ctx.world, ctx.shape = count, world, shape
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_graph("SyncBatchNorm")
        (gradient,) = gradients
        normalized, scale = ctx.saved_tensors
        over = [dim for dim in range(gradient.dim()) if dim != 1]
        sums = torch.cat([gradient.sum(over), (gradient * normalized).sum(over)])
        ctx.world.sum_(sums, "backward of SyncBatchNorm").div_(ctx.count)
        mean_gradient, mean_product = sums.view(2, -1)
        back = gradient - mean_gradient.view(ctx.shape) - normalized * mean_product.view(ctx.shape)
        return back * scale.view(ctx.shape), None, None, None, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's BatchNorm with the statistics of all ranks. In training, forward and backward block."""

    world: World | None = None
    """None after unpickling: whoever loads the model has another."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes (B, C, ...), found shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape. Every rank must call it in training. B may be 0 on some ranks.

        Raises ConfigError where it has lost its World.
        """
        if not self.training:
            return super().forward(input)
        if self.world is None:
            raise ConfigError(
                "this SyncBatchNorm was loaded from a file and belongs to no World: call "
                "convert_sync_batch_norm(model, world) before training"
            )
        x = input if input.dtype == torch.float64 else input.float()
        over = [dim for dim in range(x.dim()) if dim != 1]
        detached = x.detach()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64, device=x.device)
        # From the centred variance, in float64: sums of squares in float32 lose a variance beside a large mean.
        local_variance = local_mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        if x.numel():
            local_variance, local_mean = (part.double() for part in torch.var_mean(detached, over, correction=0))
        sums = torch.cat([local_mean * count, (local_variance + local_mean.square()) * count, count])
        self.world.sum_(sums, "forward of SyncBatchNorm")
        total = float(sums[-1])
        mean, mean_square = (sums[:-1] / total).view(2, -1)
        variance = (mean_square - mean.square()).clamp(min=0)
        if self.track_running_stats:
            self._track(mean, variance * (total / max(total - 1, 1)))
        scale = (variance + self.eps).rsqrt()
        y: Tensor = _Normalize.apply(x, mean.to(x.dtype), scale.to(x.dtype), total, self.world)  # type: ignore[no-untyped-call]
        if self.affine:
            shape = (1, -1, *([1] * (x.dim() - 2)))
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def convert_sync_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Replace every BatchNorm in `module` by one over all ranks; parameters, buffers and hooks are kept. Returns it.

    Local. Call it before the optimizer is wrapped.
    """
    return _converted(module, world, {})


def _converted(module: nn.Module, world: World, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """`done`: what has been converted, for modules that stand in several places."""
    if module in done:
        return done[module]
    if isinstance(module, SyncBatchNorm):
        module.world = world
    elif isinstance(module, _PLAIN):
        held = next(iter(module.state_dict().values()), torch.empty(0))
        replacement = SyncBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            device=held.device,
            dtype=held.dtype,
        )
        replacement.load_state_dict(module.state_dict())
        if module.affine:
            replacement.weight, replacement.bias = module.weight, module.bias
        replacement.train(module.training)
        replacement.world = world
        for name, value in vars(module).items():
            if "_hook" in name:
                setattr(replacement, name, value)
        done[module] = replacement
        return replacement
    done[module] = module
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _converted(child, world, done)
    return module
