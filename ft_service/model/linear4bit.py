"""The 4-bit linear layer whose backward pass reads the packed weight from its parameter again.

For ZeRO-3, as `ft_service.model.linear` explains. bitsandbytes' own function stores a view of the packed weight in its
context: under ZeRO-3 the whole gathered base would stay alive from forward to backward, checkpointing or not.

Importing this module imports bitsandbytes, which takes seconds.
"""

from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.autograd.function import once_differentiable


class _Linear4bit(torch.autograd.Function):
    """x [..., in] -> y [..., out] = x W^T + b, with a frozen packed W. Saves no tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, quant_state: QuantState
    ) -> torch.Tensor:
        ctx.weight = weight
        ctx.quant_state = quant_state
        # Inside this function gradients are off, and bitsandbytes calls its kernel without a context of its own.
        output: torch.Tensor = matmul_4bit(x, weight, quant_state, bias=bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = grad_outputs
        weight = dequantize_4bit(ctx.weight.view(-1, 1), ctx.quant_state)
        return torch.matmul(grad, weight.to(grad.dtype)), None, None, None


class MemoryEfficientLinear4bit(Linear4bit):
    """bitsandbytes' `Linear4bit`, bit for bit, which keeps no gathered weight alive between forward and backward pass.

    Weight and bias are frozen. Without gradients it is bitsandbytes' layer itself.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            output: torch.Tensor = super().forward(x)
            return output
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        weight: Any = self.weight
        output = _Linear4bit.apply(x.to(dtype), weight, bias, weight.quant_state)
        return output.to(x.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T [..., out], computed in the type of x and outside autograd."""
        weight: Any = self.weight
        output: torch.Tensor = matmul_4bit(x, weight, weight.quant_state)
        return output

    def dequantised(self) -> torch.Tensor:
        """W [out, in], in a new tensor."""
        weight: Any = self.weight
        whole: torch.Tensor = dequantize_4bit(weight.view(-1, 1), weight.quant_state)
        return whole.to(self.compute_dtype)
