"""Transposed convolution of kernel 4 and stride 2, with detours around what is slow on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Upsample(nn.ConvTranspose2d):
    """The transposed convolution of kernel 4, stride 2, padding 1: (N, inputs, H, W) to (N, outputs, 2H, 2W).

    The same function and initialization as nn.ConvTranspose2d.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x: (N, inputs, H, W); output_size: as it is, there is nothing to choose."""
        if x.device.type != "cpu":
            return functional.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):  # autocast does not reach inside an autograd.Function
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        y: Tensor = _TransposedConvolution.apply(x, weight)  # type: ignore[no-untyped-call]
        # Apart from the convolution: in bfloat16 oneDNN's bias gradient costs as much as its weight gradient.
        return y if self.bias is None else y + self.bias.to(y.dtype).view(1, -1, 1, 1)


class _TransposedConvolution(torch.autograd.Function):
    # oneDNN runs few output channels at a twentieth of its speed: then a matrix product and an overlap-add.
    FEW = 8

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if weight.shape[1] > _TransposedConvolution.FEW:
            return functional.conv_transpose2d(x, weight, None, stride=2, padding=1)
        count, inputs, height, width = x.shape
        columns = x.permute(0, 2, 3, 1).reshape(count, height * width, inputs) @ weight.flatten(1)
        return functional.fold(columns.transpose(1, 2), (2 * height, 2 * width), 4, padding=1, stride=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grads[0], x, weight, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, [*ctx.needs_input_grad, False]
        )
        return grad_x, grad_weight
