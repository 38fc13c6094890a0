"""The Bernoulli log-likelihood of logits, in as few passes over memory as it takes.

log p(x|l) = sum_d x_d l_d - softplus(l_d), and softplus(l) = max(l, 0) - log sigmoid(|l|). The logarithm is
what costs on a CPU, and a sum of logarithms is the logarithm of a product: sigmoid(|l|) lies in [0.5, 1], so
64 of them multiply without underflow and share one logarithm. The sigmoid is kept, for it is the gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvdvae.first_order import refuse_graph

# Each fold halves the columns; an odd column joins the first product, so 5 folds multiply at most 2**6
# factors.
_FOLDS = 5


def bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """Sums log p(x | logits) over the last dimension.

    logits: (..., B, D) of any float dtype; x: (B, D) in [0, 1], may be fractional. Returns (..., B), nats, in
    float32 whatever the logits are (float64 stays). No gradient flows to x.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula and cannot see through the fast one
        wide = logits.float()
        return (x * wide - functional.softplus(wide)).sum(-1)
    result: Tensor = _BernoulliLogProb.apply(logits, x)  # type: ignore[no-untyped-call]
    return result


def _log_product(factors: Tensor) -> Tensor:
    """Sums log(factors) over the last dimension, for factors in [0.5, 1]."""
    for fold in range(_FOLDS):
        width = factors.shape[-1]
        half = width // 2
        if half == 0 or (width % 2 and fold > 2):  # an odd width costs a strided pass: not worth it near the end
            break
        folded = factors[..., :half] * factors[..., half : 2 * half]
        if width % 2:
            folded[..., 0].mul_(factors[..., -1])
        factors = folded
    return factors.log().sum(-1)


class _BernoulliLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        sigmoid = torch.sigmoid(wide)
        ctx.save_for_backward(sigmoid, x)
        ctx.dtype = logits.dtype
        factors = 1 - sigmoid
        torch.maximum(sigmoid, factors, out=factors)  # sigmoid(|l|)
        linear = wide.clamp_min(0).addcmul_(wide, x, value=-1)
        return _log_product(factors).sub_(linear.sum(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        refuse_graph("the Bernoulli likelihood")
        sigmoid, x = ctx.saved_tensors
        return (x - sigmoid).mul_(grads[0].unsqueeze(-1)).to(ctx.dtype), None
