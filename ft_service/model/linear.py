"""Linear layers whose backward pass reads the weight from its parameter, so that ZeRO-3 can free it in between.

ZeRO-3 frees a gathered weight after a layer's forward pass by replacing the parameter's `.data`, and gathers it again
for the backward pass. `F.linear` defeats that: autograd saves a transposed view, which keeps the gathered weight alive.

The functions here store the `Parameter` object as an attribute of their context, not among the saved tensors. Under
activation checkpointing, the saved tensor of a trained parameter is an alias made during recomputation, which would
keep the gathered weight alive as well.

Legend: x [..., in], W [out, in], b [out], y = x W^T + b.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ft_service.model.cpu_products import for_product


class _Linear(torch.autograd.Function):
    """Saves x only for the gradient of W: with a frozen weight, no tensor at all."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None) -> torch.Tensor:
        needs_x_grad, needs_weight_grad, _ = ctx.needs_input_grad
        if needs_x_grad:
            ctx.weight = weight
        if needs_weight_grad:
            ctx.save_for_backward(x)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # dL/dx = g W,  dL/dW = g^T x,  dL/db = sum of g over rows, with g = dL/dy.
        needs_x_grad, needs_weight_grad, needs_bias_grad = ctx.needs_input_grad
        grad = for_product(grad_outputs[0].flatten(0, -2))
        dtype = grad_outputs[0].dtype
        grad_x = None
        grad_weight = None
        if needs_weight_grad:
            # Trap: under activation checkpointing, this line may run the layer's forward pass, and with it the hooks
            # that gather and free weights. So W is read afterwards.
            (x,) = ctx.saved_tensors
            grad_weight = grad.t().mm(for_product(x.reshape(-1, x.shape[-1]))).to(dtype)
        if needs_x_grad:
            grad_x = grad.mm(for_product(ctx.weight)).to(dtype)
            grad_x = grad_x.view(*grad_outputs[0].shape[:-1], ctx.weight.shape[1])
        return grad_x, grad_weight, grad_outputs[0].flatten(0, -2).sum(0) if needs_bias_grad else None


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide_bias = None if bias is None else for_product(bias)
    return F.linear(for_product(x), for_product(weight), wide_bias).to(x.dtype)


class MemoryEfficientLinear(nn.Linear):
    """`nn.Linear`, which keeps no gathered weight alive between forward and backward pass.

    Bit for bit, except on a CPU that multiplies in another type: see `ft_service.model.cpu_products`.
    Not for autocast, nor for second derivatives. x has two or more dimensions.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return _product(input, self.weight, self.bias)
        output: torch.Tensor = _Linear.apply(input, self.weight, self.bias)
        return output


def make_linears_memory_efficient(model: nn.Module) -> None:
    """Turn every plain `nn.Linear` in `model` into a `MemoryEfficientLinear`, with the same parameters."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = MemoryEfficientLinear
