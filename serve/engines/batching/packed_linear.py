"""Linear layers for a CPU, with weights in the layout that oneDNN's kernels read.

torch multiplies a few rows with a plain fp32 weight by MKL, which copies the weight into its own layout in every call.
Reordered once, the 16 rows of a decoding batch take a third of the time, and those of one sequence half
(benchmarks/serve.py's model, 2 cores of Zen 4). torch's own compiler does the same when it freezes weights.

Layers that share their input are one product: a small one of its own costs as much again in launches.
"""

from collections.abc import Sequence

import torch
from torch import nn

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that `LlamaForCausalLM` calls with the same tensor, in this order."""
_TYPICAL_ROWS = 16
"""oneDNN chooses the layout for a number of rows; products of any other number read it, too."""
_linear_pointwise = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """y = x W^T + b of a frozen `nn.Linear`; [..., I] -> [..., O]. Keeps the reordered weight only."""

    def __init__(self, linear: nn.Linear, product: "_Product | None" = None, first_output: int = 0) -> None:
        """With a `product`, its weight has the rows of `linear`, from `first_output` on."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self._product = product or _Product([linear])
        self._first_output = first_output
        self._is_alone = self._product.num_outputs == self.out_features

    @classmethod
    def together(cls, linears: Sequence[nn.Linear]) -> "list[PackedLinear]":
        """Layers that are called one after the other with the same tensor: the first call computes for all."""
        product = _Product(linears)
        first_outputs = [sum(len(before.weight) for before in linears[:index]) for index in range(len(linears))]
        return [cls(linear, product, first) for linear, first in zip(linears, first_outputs, strict=True)]

    @property
    def weight(self) -> torch.Tensor:
        """In oneDNN's layout, of all layers that are computed together. `dense_weight` copies this layer's."""
        return self._product.weight

    def dense_weight(self) -> torch.Tensor:
        """[O, I] in the plain layout, bit for bit."""
        return self.weight.to_dense()[self._first_output : self._first_output + self.out_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_alone:
            return self._product.compute(x)
        return self._product.part(x, self._first_output, self.out_features)


class _Product:
    """The outputs of one or more layers for the same input, side by side."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights = [linear.weight.detach() for linear in linears]
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.num_outputs = sum(map(len, weights))
        weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _TYPICAL_ROWS)
        self._bias = torch.cat(biases) if biases else None
        self._x: torch.Tensor | None = None
        self._y: torch.Tensor | None = None
        self._taken: set[int] = set()
        self._num_layers = len(weights)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _linear_pointwise(x, self.weight, self._bias, "none", [], "")
        return y

    def part(self, x: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Outputs of one layer, a view. The caller may change it, so a layer's second call computes again."""
        if self._y is None or self._x is not x or first in self._taken:
            self._x = x
            self._y = self.compute(x)
            self._taken.clear()
        part = self._y[..., first : first + count]
        self._taken.add(first)
        if len(self._taken) == self._num_layers:  # free it, now that all layers have theirs
            self._x = None
            self._y = None
        return part


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of `model` that oneDNN can compute, in place; does nothing on a GPU or in 4 bits.

    A head that shares its weight with the embedding gets a copy. Peak memory is twice the weights of layers that are
    computed together above the sum of all.
    """
    for parent in list(model.modules()):
        layers = {
            name: layer
            for name, layer in parent.named_children()
            if type(layer) is nn.Linear and _can_pack(layer.weight)  # 4-bit layers are of classes of their own
        }
        groups = [names for names in SHARED_INPUTS if _can_share([layers.get(name) for name in names])]
        alone = [(name,) for name in layers if not any(name in names for names in groups)]
        for names in (*groups, *alone):
            for name, packed in zip(names, PackedLinear.together([layers.pop(name) for name in names]), strict=True):
                setattr(parent, name, packed)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _can_share(layers: Sequence[nn.Linear | None]) -> bool:
    """Whether all are there, and either all or none has a bias."""
    kinds = {(layer.weight.dtype, layer.bias is None) if layer is not None else None for layer in layers}
    return len(kinds) == 1 and None not in kinds
