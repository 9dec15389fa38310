"""Faster forward passes for the layers of a Llama that is being trained. Modules, parameters and names stay stock.

Stock layers convert activations to fp32 and back, scale and add LoRA's output in passes of its own, and keep the
intermediate results. The functions here give the same values with fewer passes over memory, and save only what the
backward pass reads. They replace the `forward` of single modules; transformers' and peft's classes stay as they are.
Linear layers with the same input run as one: see `ft_service.model.linear_group`.

Legend: T tokens, H heads, E head width.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS, LlamaAttention, LlamaMLP, LlamaRMSNorm

from ft_service.model.linear_group import LinearGroup

_CPU_CHUNK_ELEMENTS = 128 * 1024
"""Elements of a chunk of rows whose fp32 copies stay in a CPU's cache."""


def use_training_layers(model: nn.Module) -> None:
    """Replace the forward pass of norms, attention, MLPs and LoRA layers in `model`, a Llama with or without peft."""
    module: Any
    for module in model.modules():
        kind = type(module)
        forward: Callable[..., Any] | None = None
        if kind is LlamaRMSNorm:
            forward = _norm_forward
        elif kind is LlamaAttention:
            module.inputs = LinearGroup([module.q_proj, module.k_proj, module.v_proj])
            forward = _attention_forward
        elif kind is LlamaMLP and module.config.hidden_act == "silu":
            module.inputs = LinearGroup([module.gate_proj, module.up_proj])
            forward = _mlp_forward
        elif kind is DoraLinearLayer:
            forward = _dora_forward
        elif issubclass(kind, LoraLayer):
            module.alone = LinearGroup([module])
            if module.alone.is_plain:
                forward = _lora_forward
        if forward is not None:
            module.forward = MethodType(forward, module)


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
        ctx.weight = weight
        ctx.save_for_backward(x, inverse)
        return result.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        # With n = x inverse:  dL/dn = g weight,  dL/dx = inverse (dL/dn - n mean(n dL/dn)),  dL/dweight = sum(g n).
        x, inverse = ctx.saved_tensors
        weight = ctx.weight
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
    query, key, value = (product.view(by_head).transpose(1, 2) for product in self.inputs(hidden_states))
    query, key = rotate(query, key, cos, sin)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _no_eager_attention)
    dropout = self.attention_dropout if self.training else 0.0
    output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


def _no_eager_attention(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("models are trained with packed attention, not with transformers' eager one")


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions: x cos + rotate_half(x) sin, with x [1, H, T, E] and angles [1, 1, T, E].

    As transformers computes them, but the last product and the sum are rounded once.
    """
    rotated: tuple[torch.Tensor, torch.Tensor] = _Rotary.apply(query, key, cos, sin)
    return rotated


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.angles = cos, sin  # all layers share them
        return _rotated(query, cos, sin, 1), _rotated(key, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.angles
        query, key = (_rotated(gradient, cos, sin, -1) for gradient in gradients)  # the transpose turns back
        return query, key, None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    """Both halves of `cos` are alike, and so are those of `sin`."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return turned


# -- MLP -------------------------------------------------------------------------------------------------------------


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.down_proj(swiglu(*self.inputs(x)))
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


def _lora_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of a layer that is called by itself: no other reads its input, or its group cannot be computed as one."""
    group: LinearGroup = self.alone
    if args or kwargs or not group.can_compute(x):
        stock: Callable[..., torch.Tensor] = type(self).forward
        return stock(self, x, *args, **kwargs)
    (adapter,) = group.adapters
    (output,) = group.compute(x, adapter.dropout(x) if adapter.drops else None)
    return output


def _dora_forward(
    self: Any, x: torch.Tensor, *, base_layer: nn.Module, base_result: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """peft's own, but with dropout the base layer computes the product of the dropped input x.

    peft computes it with `F.linear`, which keeps the weight alive until the backward pass: a gathered one, or under
    QLoRA an unpacked one. If nothing is dropped, peft gives the base layer's own product as `base_result`.
    """
    if base_result is None:
        base_result = base_layer(x)
    result: torch.Tensor = DoraLinearLayer.forward(self, x, base_layer=base_layer, base_result=base_result, **kwargs)
    return result
