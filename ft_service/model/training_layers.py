"""Faster forward passes for the layers of a Llama that is being trained. Modules, parameters and names stay stock.

Stock layers convert activations to fp32 and back, scale and add LoRA's output in passes of its own, and keep the
intermediate results. The functions here give the same values with fewer passes over memory, and save only what the
backward pass reads. They replace the `forward` of single modules; transformers' and peft's classes stay as they are.

Legend: T tokens, D width of an input, O of an output, R rank of an adapter, H heads, E head width.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaAttention, LlamaMLP, LlamaRMSNorm

_CPU_CHUNK_ELEMENTS = 128 * 1024
"""Elements of a chunk of rows whose fp32 copies stay in a CPU's cache."""


def use_training_layers(model: nn.Module) -> None:
    """Replace the forward pass of norms, attention, MLPs and LoRA layers in `model`, a Llama with or without peft."""
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.forward = MethodType(_norm_forward, module)  # type: ignore[method-assign]
        elif type(module) is LlamaAttention:
            module.forward = MethodType(_attention_forward, module)  # type: ignore[method-assign]
        elif type(module) is LlamaMLP and module.config.hidden_act == "silu":
            module.forward = MethodType(_mlp_forward, module)  # type: ignore[method-assign]
        elif isinstance(module, LoraLayer) and isinstance(module, nn.Module) and _is_plain_lora(module):
            _replace_lora_forward(module)


# -- RMS norm --------------------------------------------------------------------------------------------------------


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`weight` x / sqrt(mean(x^2) + `epsilon`) over the last dimension, in fp32, rounded once to the type of `x`.

    transformers rounds the normalised input as well, before it is multiplied by the weight.
    """
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, epsilon)  # one kernel forward and one backward
    result: torch.Tensor = _RmsNormOnCpu.apply(x, weight, epsilon)
    return result


class _RmsNormOnCpu(torch.autograd.Function):
    """torch has no fused kernel for a CPU, and saves two fp32 copies of the input. This saves the input alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = torch.empty_like(rows)
        inverse = torch.empty(rows.shape[0], 1, dtype=torch.float32)
        scale = weight.float()
        for chunk in _chunks(*rows.shape):
            wide = rows[chunk].float()
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            inverse[chunk] = norm.square_().div_(wide.shape[-1]).add_(epsilon).rsqrt_()
            result[chunk] = (wide * inverse[chunk]).mul_(scale)
        ctx.save_for_backward(x, weight, inverse)
        return result.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        # With n = x inverse:  dL/dn = g weight,  dL/dx = inverse (dL/dn - n mean(n dL/dn)),  dL/dweight = sum(g n).
        x, weight, inverse = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        rows = x.reshape(-1, x.shape[-1])
        gradient = gradients[0].reshape(rows.shape)
        grad_x = torch.empty_like(rows) if needs_input else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32) if needs_weight else None
        scale = weight.float()
        for chunk in _chunks(*rows.shape):
            normalised = rows[chunk].float() * inverse[chunk]
            wide = gradient[chunk].to(torch.float32, copy=True)
            if grad_weight is not None:
                grad_weight += (wide * normalised).sum(0)
            if grad_x is not None:
                wide *= scale
                mean = (wide * normalised).mean(-1, keepdim=True)
                grad_x[chunk] = wide.addcmul_(normalised, mean, value=-1).mul_(inverse[chunk])
        return (
            None if grad_x is None else grad_x.view_as(x),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
        )


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(1, _CPU_CHUNK_ELEMENTS // width)
    return [slice(start, start + step) for start in range(0, rows, step)]


# -- rotary positions and attention ----------------------------------------------------------------------------------


def _attention_forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if past_key_values is not None or position_embeddings is None:
        stock: tuple[torch.Tensor, torch.Tensor | None] = LlamaAttention.forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return stock
    by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
    cos, sin = (angles.unsqueeze(1) for angles in position_embeddings)
    query = rotate(self.q_proj(hidden_states).view(by_head).transpose(1, 2), cos, sin)
    key = rotate(self.k_proj(hidden_states).view(by_head).transpose(1, 2), cos, sin)
    value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _no_eager_attention)
    dropout = self.attention_dropout if self.training else 0.0
    output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def _no_eager_attention(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("models are trained with packed attention, not with transformers' eager one")


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x cos + rotate_half(x) sin, with x [1, H, T, E] and angles [1, 1, T, E].

    As transformers computes them, but the last product and the sum are rounded once.
    """
    result: torch.Tensor = _Rotary.apply(x, cos, sin)
    return result


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, sin, -1), None, None  # the transpose of a rotation turns back


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    """Both halves of `cos` are alike, and so are those of `sin`."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned


# -- MLP -------------------------------------------------------------------------------------------------------------


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
    return result


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) `up`; saves the two, and computes silu(`gate`) again in the backward pass."""
    result: torch.Tensor = _Swiglu.apply(gate, up)
    return result


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        gradient = gradients[0]
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


# -- LoRA ------------------------------------------------------------------------------------------------------------


def _is_plain_lora(layer: Any) -> bool:
    """One adapter on a linear layer, as in the paper: no DoRA, no bias."""
    if list(layer.lora_A) != list(layer.active_adapters) or len(layer.lora_A) != 1 or layer.lora_variant:
        return False
    (name,) = layer.lora_A
    parts = [layer.lora_A[name], layer.lora_B[name]]
    return all(type(part) is nn.Linear and part.bias is None for part in parts)


def _replace_lora_forward(layer: Any) -> None:
    (name,) = layer.lora_A
    layer.forward = MethodType(_lora_forward, layer)
    # The adapter's own modules run, because ZeRO-3 gathers their weights when they do.
    layer.lora_A[name].forward = MethodType(_lora_a_forward, layer.lora_A[name])
    layer.lora_B[name].forward = MethodType(_lora_b_forward, layer.lora_B[name])


def _lora_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    (name,) = self.lora_A
    weight = self.lora_A[name].weight
    if args or kwargs or self.disable_adapters or self.merged or x.dtype != weight.dtype:
        stock: Callable[..., torch.Tensor] = type(self).forward
        return stock(self, x, *args, **kwargs)
    dropout = self.lora_dropout[name]
    if isinstance(dropout, nn.Identity) or not self.training:
        x, low = self.lora_A[name](x, and_input=True)
    else:
        low = self.lora_A[name](dropout(x))
    base_output = self.base_layer(x)
    if base_output.dtype != low.dtype:
        low = low.to(base_output.dtype)
    result: torch.Tensor = self.lora_B[name](low, base_output, self.scaling[name])
    return result


def _lora_a_forward(self: Any, x: torch.Tensor, and_input: bool = False) -> Any:
    if not and_input:
        return F.linear(x, self.weight)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x, F.linear(x, self.weight)
    return _LoraDown.apply(x, self.weight)


def _lora_b_forward(
    self: Any, low: torch.Tensor, base_output: torch.Tensor | None = None, scaling: float = 1.0
) -> torch.Tensor:
    if base_output is None:
        return F.linear(low, self.weight)
    result: torch.Tensor = _LoraUp.apply(base_output, low, self.weight, scaling)
    return result


class _LoraDown(torch.autograd.Function):
    """x [.., D] and A [R, D] -> x for the base layer, and x A^T [.., R].

    The base layer's gradient comes back through the first output, so that the adapter's share can be added to it within
    one matrix product. Trap: that product overwrites the gradient. Nothing else holds it, for only the base layer reads
    this output.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(x, weight)
        return x, F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_low = gradients
        low_rows = grad_low.reshape(-1, weight.shape[0])
        total = grad_x.reshape(-1, weight.shape[1]).addmm_(low_rows, weight).view_as(x)
        grad_weight = low_rows.T @ x.reshape(-1, weight.shape[1]) if ctx.needs_input_grad[1] else None
        return total, grad_weight


class _LoraUp(torch.autograd.Function):
    """base output [.., O] + scaling low B^T, with low [.., R] and B [O, R]. Trap: overwrites the base output."""

    @staticmethod
    def forward(
        ctx: Any, base_output: torch.Tensor, low: torch.Tensor, weight: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(low, weight)
        ctx.scaling = scaling
        output = base_output.detach()
        output.view(-1, weight.shape[0]).addmm_(low.reshape(-1, weight.shape[1]), weight.T, alpha=scaling)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        low_rows = low.reshape(-1, weight.shape[1])
        needs_low, needs_weight = ctx.needs_input_grad[1:3]
        grad_low = _scaled_product(gradient, weight, ctx.scaling).view_as(low) if needs_low else None
        grad_weight = _scaled_product(gradient.T, low_rows, ctx.scaling) if needs_weight else None
        return gradients[0], grad_low, grad_weight, None


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling` a b, in one matrix product."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
