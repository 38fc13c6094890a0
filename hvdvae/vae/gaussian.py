"""Diagonal Gaussians over latents, in float32 whatever precision the networks ran in."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvdvae.first_order import refuse_graph


class DiagonalGaussian(NamedTuple):
    """N(mean, exp(log_sigma)^2), independent over the last dimension.

    packed: (..., 2L), a network's output of any float dtype: first the means, then the log sigmas.
    """

    packed: Tensor

    @property
    def mean(self) -> Tensor:
        """(..., L) float32."""
        return self.packed.chunk(2, dim=-1)[0].float()

    @property
    def log_sigma(self) -> Tensor:
        """(..., L) float32."""
        return self.packed.chunk(2, dim=-1)[1].float()

    def sample(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """z = mean + sigma * noise, and KL(self || N(0, 1)) in closed form.

        noise: (K, ..., L) for a packed (1 or K, ..., 2L). Returns z (K, ..., L) and the KL (Kingma and
        Welling 2014, appendix B) in nats per dimension, of the batch shape of packed, (1 or K, ..., L).
        """
        if torch.compiler.is_compiling():
            mean, log_sigma = self.packed.float().chunk(2, dim=-1)
            sigma = torch.exp(log_sigma)
            return torch.addcmul(mean, sigma, noise), 0.5 * (mean.square() + sigma.square() - 1) - log_sigma
        z, kl = _SampleAndKL.apply(self.packed, noise)  # type: ignore[no-untyped-call]
        return z, kl

    def log_ratio_to_standard(self, z: Tensor, noise: Tensor) -> Tensor:
        """log q(z) - log N(z; 0, 1), (K, ..., L), at the z drawn with this noise."""
        return 0.5 * (z.square() - noise.square()) - self.log_sigma

    def log_ratio(self, z: Tensor, noise: Tensor, prior: "DiagonalGaussian") -> Tensor:
        """log q(z) - log prior(z), (K, ..., L), at the z drawn with this noise."""
        log_sigma = prior.log_sigma
        scaled = (z - prior.mean) * torch.exp(-log_sigma)
        return 0.5 * (scaled.square() - noise.square()) + log_sigma - self.log_sigma


class _SampleAndKL(torch.autograd.Function):
    """One node in place of twenty: for tensors this small the dispatch is the whole cost."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        wide = packed if packed.dtype == torch.float64 else packed.float()
        mean, log_sigma = wide.chunk(2, dim=-1)
        sigma = torch.exp(log_sigma)
        ctx.save_for_backward(mean, sigma, noise)
        ctx.dtype = packed.dtype
        kl = (sigma * sigma).addcmul_(mean, mean).sub_(1).mul_(0.5).sub_(log_sigma)
        return torch.addcmul(mean, sigma, noise), kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        refuse_graph("the sample of a Gaussian and its KL")
        mean, sigma, noise = ctx.saved_tensors
        grad_z, grad_kl = grads
        by_noise = grad_z * noise
        if grad_z.shape[0] != mean.shape[0]:  # one q, many samples
            grad_z, by_noise = grad_z.sum(0, keepdim=True), by_noise.sum(0, keepdim=True)
        packed = torch.empty((*mean.shape[:-1], 2 * mean.shape[-1]), dtype=mean.dtype, device=mean.device)
        grad_mean, grad_log_sigma = packed.chunk(2, dim=-1)
        torch.addcmul(grad_z, grad_kl, mean, out=grad_mean)
        torch.addcmul(by_noise * sigma, grad_kl, sigma * sigma - 1, out=grad_log_sigma)
        return packed.to(ctx.dtype), None
