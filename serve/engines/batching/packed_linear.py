"""Linear layers for a CPU, with weights in the layout that oneDNN's kernels read.

torch multiplies a few rows with a plain fp32 weight by MKL, which copies the weight into its own layout in every call.
Reordered once, the 16 rows of a decoding batch take a third of the time, and those of one sequence half
(benchmarks/serve.py's model, 2 cores of Zen 4). torch's own compiler does the same when it freezes weights.
"""

import torch
from torch import nn

_TYPICAL_ROWS = 16
"""oneDNN chooses the layout for a number of rows; products of any other number read it, too."""


class PackedLinear(nn.Module):
    """y = x W^T + b of a frozen `nn.Linear`; [..., I] -> [..., O]. Keeps the reordered weight only."""

    weight: torch.Tensor
    """[O, I] in oneDNN's layout. `to_dense` copies it into the plain one, bit for bit."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach()
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight_OI, _TYPICAL_ROWS))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def pack_linear_layers(model: nn.Module) -> None:
    """Replace the linear layers of `model` that oneDNN can compute, in place; does nothing on a GPU or in 4 bits.

    A head that shares its weight with the embedding gets a copy. Peak memory is one weight above the sum of all.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and _can_pack(layer.weight):  # 4-bit layers are of classes of their own
                setattr(parent, name, PackedLinear(layer))


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
