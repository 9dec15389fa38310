"""NF4 weights with double quantisation, a share at a time. The only user of bitsandbytes.

bitsandbytes scales each block of 64 weights by its largest magnitude, and quantises those scales once more, to 8 bits
in groups of 256, less their mean. The blocks do not depend on each other. So a process quantises just the blocks it
holds; only the scales (1/16 of a byte a weight) have to be seen whole, for their mean and their groups.

bitsandbytes takes seconds to import, and brings torch's compiler with it: only functions that need it import it.
"""

import sys
from typing import Any

import torch
from torch import nn

from ft_service.errors import ModelError
from ft_service.model.shards import NF4_BLOCK

_TYPE = "nf4"
_SCALES_PER_GROUP = 256


def make_linears_4bit(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer of the decoder of `model`, on the meta device, by an NF4 one without weights yet.

    The head stays as it is. `dtype` is that of activations, and the type in which packed weights are stored: ZeRO
    gathers and partitions a floating type without touching its bits, another type it would cast.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ModuleNotFoundError:
        raise ModelError(
            "method.type = 'qlora': this process has begun without 4-bit weights. Begin another one with four_bit=True."
        ) from None

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        linear = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=dtype,
            quant_type=_TYPE,
            quant_storage=dtype,
            device="meta",
        )
        # On processors with AVX512-BF16 the first `eval()` forward without gradients (a validation) would repack the
        # weights in place for inference, and nothing unpacks them for training.
        linear.support_avx512bf16_for_cpu = False
        linear.weight = packed_parameter(
            torch.empty(packed_shape(name, module.weight, dtype), dtype=dtype, device="meta")
        )
        linear.bias = module.bias
        model.set_submodule(name, linear)


def packed_shape(name: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Of the packed weights: two weights a byte, `dtype.itemsize` bytes an element, as bitsandbytes lays them out."""
    if weight.numel() % (2 * dtype.itemsize):
        raise ModelError(f"method.type = 'qlora': {name} of shape {list(weight.shape)} cannot be packed. Use lora.")
    return weight.numel() // (2 * dtype.itemsize), 1


def packed_parameter(data: torch.Tensor) -> nn.Parameter:
    """A parameter of weights that are quantised already; bitsandbytes will not do it again."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(data, quant_type=_TYPE, quant_storage=data.dtype, bnb_quantized=True)


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether `parameter` holds 4-bit weights; without bitsandbytes imported there are none."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(parameter, library.nn.Params4bit)


def quantise(weights: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole blocks of n flat `weights` -> packed [n / 2 / storage.itemsize], and their scales [n / 64] in fp32."""
    packed, scales = torch.ops.bitsandbytes.quantize_4bit.default(weights, NF4_BLOCK, _TYPE, storage)
    return packed.view(-1), scales


def attach_statistics(parameter: Any, linear: Any, scales: torch.Tensor, shape: torch.Size) -> None:
    """Give a parameter the statistics to undo its quantisation with, from the scales of the whole tensor.

    The same arithmetic as `bitsandbytes.functional.quantize_4bit(..., compress_statistics=True)`. `shape` is that of
    the weights before they were packed.
    """
    from bitsandbytes import functional as bnb

    offset = scales.mean()
    compressed, groups = bnb.quantize_blockwise(scales - offset, blocksize=_SCALES_PER_GROUP)
    state = bnb.QuantState(
        absmax=compressed,
        shape=shape,
        dtype=parameter.quant_storage,
        blocksize=NF4_BLOCK,
        code=bnb.get_4bit_type(_TYPE, device=scales.device),
        quant_type=_TYPE,
        offset=offset,
        state2=groups,
    )
    parameter.quant_state = linear.quant_state = state
    parameter.module = linear


def statistics_bytes(num_weights: int) -> int:
    """What the statistics of a tensor take: 8 bits a block, 32 a group of blocks, and the tables to read them with."""
    blocks = -(-num_weights // NF4_BLOCK)
    return blocks + 4 * -(-blocks // _SCALES_PER_GROUP) + 4 * (1 + 16 + 256)


def statistics_tensors(parameter: Any) -> list[torch.Tensor]:
    """The tensors of a 4-bit parameter's statistics, for whoever counts memory."""
    state = parameter.quant_state
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
