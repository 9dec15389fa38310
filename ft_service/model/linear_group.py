"""Linear layers that read the same input, with their LoRA adapters, as one function of autograd.

Queries, keys and values read one x; gate and up read another. Layer by layer, each adapter reads x again, and autograd
adds the gradients of x in passes of their own. As a group, one product computes x A^T for all adapters, and each
gradient of x is added by the matrix product that computes it.

The backward pass reads weights from their parameters, for ZeRO-3, as `ft_service.model.linear` explains.

Legend, for layer i of a group: x [..., D], W_i [O_i, D], A_i [R_i, D], B_i [O_i, R_i], scaling s_i,
y_i = x W_i^T + s_i x A_i^T B_i^T. A is all A_i stacked, [R, D]. T rows of x; g_i = dL/dy_i.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable

from ft_service.model.cpu_products import for_product
from ft_service.model.linear import MemoryEfficientLinear
from ft_service.model.nf4 import is_4bit_linear

_PLAIN = (nn.Linear, MemoryEfficientLinear)


@dataclass(frozen=True)
class _Adapter:
    """One adapter as in the paper: no DoRA, no bias."""

    layer: Any
    dropout: nn.Module
    a: nn.Linear
    b: nn.Linear
    scaling: float
    part: slice
    """Of A's rows, and of the columns of x A^T."""

    @classmethod
    def of(cls, layer: Any, start: int) -> "_Adapter | None":
        """The adapter of `layer`, whose part starts at `start`; None if it is not as in the paper."""
        if list(layer.lora_A) != list(layer.active_adapters) or len(layer.lora_A) != 1 or layer.lora_variant:
            return None
        (name,) = layer.lora_A
        a = layer.lora_A[name]
        b = layer.lora_B[name]
        if any(type(linear) not in _PLAIN or linear.bias is not None for linear in (a, b)):
            return None
        return cls(layer, layer.lora_dropout[name], a, b, layer.scaling[name], slice(start, start + a.out_features))

    @property
    def drops(self) -> bool:
        return self.dropout.training and not isinstance(self.dropout, nn.Identity)


@dataclass(frozen=True)
class _Member:
    """A linear layer without a bias."""

    linear: Any
    is_4bit: bool
    adapter: _Adapter | None

    def computes_in(self, dtype: torch.dtype) -> bool:
        """Whether the layer computes x of `dtype` in `dtype`, and its adapter is in use."""
        own_dtype: torch.dtype = self.linear.compute_dtype if self.is_4bit else self.linear.weight.dtype
        if self.adapter is None:
            return own_dtype == dtype
        layer = self.adapter.layer
        return own_dtype == dtype == self.adapter.a.weight.dtype and not (layer.disable_adapters or layer.merged)

    def output(self, rows: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
        """y [T, O] of `rows` [T, D]; `low` is x A^T, [T, R]. All are in the type that is multiplied."""
        adapter = self.adapter
        if self.is_4bit:  # bitsandbytes' product adds to nothing, so the adapter's comes second
            output: torch.Tensor
            if rows.dtype == self.linear.compute_dtype:
                output = self.linear.product(rows)
            else:  # bitsandbytes would unpack W to another type, which rounds it differently
                output = F.linear(rows, self.weight())
            if adapter is not None and low is not None:
                output.addmm_(low[:, adapter.part], for_product(adapter.b.weight).T, alpha=adapter.scaling)
            return output
        if adapter is None or low is None:
            return F.linear(rows, for_product(self.linear.weight))
        # The narrow product only writes, and the wide one adds to it while it computes.
        output = _scaled_product(low[:, adapter.part], for_product(adapter.b.weight).T, adapter.scaling)
        return output.addmm_(rows, for_product(self.linear.weight).T)

    def weight(self) -> torch.Tensor:
        """W in the type that is multiplied; unpacked into a new tensor if it has 4 bits."""
        weight: torch.Tensor = self.linear.dequantised() if self.is_4bit else self.linear.weight
        return for_product(weight)


class LinearGroup:
    """Linear layers, with or without adapters, that read the same x. Call it instead of the layers.

    It computes them as one function if it can. It cannot if a layer has a bias, DoRA, adapter dropout or a hook, or if
    an adapter is merged or disabled. Then it calls each layer.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = tuple(layers)
        members: list[_Member] = []
        rank = 0
        for layer in layers:
            adapter = None
            linear: Any = layer
            if isinstance(layer, LoraLayer):
                adapter = _Adapter.of(layer, rank)
                linear = layer.get_base_layer() if adapter is not None else None
            is_4bit = is_4bit_linear(linear)
            if (is_4bit or type(linear) in _PLAIN) and linear.bias is None:
                members.append(_Member(linear, is_4bit, adapter))
                rank += adapter.a.out_features if adapter is not None else 0
        self.members = tuple(members)
        self.adapters = tuple(member.adapter for member in members if member.adapter is not None)
        self.is_plain = len(members) == len(layers)
        """Whether no layer has a bias, DoRA or anything else that `compute` does not."""
        self._not_called: list[nn.Module] = [*layers] if len(layers) > 1 else []
        self._not_called += [member.linear for member in members]
        self._not_called += [linear for adapter in self.adapters for linear in (adapter.a, adapter.b)]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [..., D] -> y_i [..., O_i] of each layer."""
        if self.can_compute(x) and not any(adapter.drops for adapter in self.adapters):
            return self.compute(x)
        return tuple(layer(x) for layer in self._layers)

    def can_compute(self, x: torch.Tensor) -> bool:
        """Whether `compute` is what the layers compute, dropout aside.

        A hook may be one of ZeRO-3's, which gathers the weights of its module.
        """
        if not self.is_plain or not all(member.computes_in(x.dtype) for member in self.members):
            return False
        return not any(module._forward_pre_hooks or module._forward_hooks for module in self._not_called)

    def compute(self, x: torch.Tensor, adapter_input: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """y_i of each layer; if `adapter_input` is given, of the shape of x, the adapters read it instead of x."""
        # Autograd finds parameters among the arguments only: W_i, then A_i and B_i of each adapter.
        parameters = [member.linear.weight for member in self.members]
        parameters += [linear.weight for adapter in self.adapters for linear in (adapter.a, adapter.b)]
        outputs: tuple[torch.Tensor, ...] = _Products.apply(self, x, adapter_input, *parameters)
        return outputs

    def stacked_a(self) -> torch.Tensor:
        """A in the type that is multiplied.

        Made anew for each pass: a copy kept from one to the next would outlive weights that ZeRO-3 frees.
        """
        weights = [adapter.a.weight for adapter in self.adapters]
        return for_product(weights[0] if len(weights) == 1 else torch.cat(weights))


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: LinearGroup, x: torch.Tensor, adapter_input: torch.Tensor | None, *parameters: nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        rows = for_product(_rows(x))
        low = None
        if group.adapters:
            adapter_rows = rows if adapter_input is None else for_product(_rows(adapter_input))
            low = F.linear(adapter_rows, group.stacked_a())
        needs = ctx.needs_input_grad[3:]
        needs_w = any(needs[: len(group.members)])
        needs_adapter = any(needs[len(group.members) :])
        ctx.group = group
        ctx.has_adapter_input = adapter_input is not None
        ctx.save_for_backward(
            x if needs_w or (needs_adapter and adapter_input is None) else None,
            adapter_input if needs_adapter else None,
            low.to(x.dtype) if needs_adapter and low is not None else None,
        )
        outputs = (member.output(rows, low).to(x.dtype) for member in group.members)
        return tuple(output.view(*x.shape[:-1], output.shape[1]) for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # dL/dx = sum of s_i g_i B_i A_i + g_i W_i,  dL/dW_i = g_i^T x,  dL/dA_i = s_i (g_i B_i)^T x,
        # dL/dB_i = s_i g_i^T (x A_i^T).
        # Trap: under activation checkpointing, this line may run the layer's forward pass, and with it the hooks that
        # gather and free weights. So weights are read afterwards.
        x, adapter_input, low = ctx.saved_tensors
        group: LinearGroup = ctx.group
        _, needs_x, needs_adapter_input, *needs = ctx.needs_input_grad
        dtype = grad_outputs[0].dtype
        gradients = [for_product(_rows(gradient)) for gradient in grad_outputs]
        rows = None if x is None else for_product(_rows(x))
        needs_w = needs[: len(group.members)]
        grad_w: list[torch.Tensor | None] = [None] * len(group.members)
        if rows is not None:
            grad_w = [g.T @ rows if needed else None for g, needed in zip(gradients, needs_w, strict=True)]
        grad_adapters: Sequence[torch.Tensor | None] = ()
        grad_x = None
        grad_adapter_input = None
        if group.adapters:
            grad_low = _grad_low(group, gradients)
            if low is None:  # the adapters are not trained
                grad_adapters = [None] * len(group.adapters) * 2
            else:
                adapter_rows = rows if adapter_input is None else for_product(_rows(adapter_input))
                assert adapter_rows is not None  # whichever the adapters read was saved
                grad_adapters = _grad_adapters(group, gradients, grad_low.T @ adapter_rows, for_product(low))
            if not ctx.has_adapter_input and needs_x:
                grad_x = grad_low @ group.stacked_a()
            elif needs_adapter_input:
                grad_adapter_input = grad_low @ group.stacked_a()
        if needs_x:
            for member, gradient in zip(group.members, gradients, strict=True):
                grad_x = gradient @ member.weight() if grad_x is None else grad_x.addmm_(gradient, member.weight())
        shape = grad_outputs[0].shape[:-1]
        found = [gradient if gradient is None else gradient.to(dtype) for gradient in (*grad_w, *grad_adapters)]
        grad_inputs = [
            gradient if gradient is None else gradient.to(dtype).view(*shape, gradient.shape[1])
            for gradient in (grad_x, grad_adapter_input)
        ]
        return None, *grad_inputs, *found


def _grad_low(group: LinearGroup, gradients: list[torch.Tensor]) -> torch.Tensor:
    """dL/d(x A^T): all s_i g_i B_i side by side, [T, R]."""
    result = gradients[0].new_empty(gradients[0].shape[0], group.adapters[-1].part.stop)
    for member, gradient in zip(group.members, gradients, strict=True):
        adapter = member.adapter
        if adapter is not None:
            result[:, adapter.part].addmm_(gradient, for_product(adapter.b.weight), beta=0, alpha=adapter.scaling)
    return result


def _grad_adapters(
    group: LinearGroup, gradients: list[torch.Tensor], grad_a: torch.Tensor, low: torch.Tensor
) -> list[torch.Tensor]:
    """dL/dA_i and dL/dB_i of each adapter, from dL/dA and x A^T."""
    found: list[torch.Tensor] = []
    for member, gradient in zip(group.members, gradients, strict=True):
        adapter = member.adapter
        if adapter is not None:
            grad_b = _grad_b(gradient, low[:, adapter.part], adapter.scaling)
            found += [grad_a[adapter.part], grad_b]
    return found


def _grad_b(gradient: torch.Tensor, low: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling` `gradient`^T `low`. A CPU computes the transpose in half the time."""
    if gradient.device.type == "cpu":
        return _scaled_product(low.T, gradient, scaling).T.contiguous()
    return _scaled_product(gradient.T, low, scaling)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [T, D]"""
    return x.reshape(-1, x.shape[-1])


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling` a b, in one matrix product."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scaling)
