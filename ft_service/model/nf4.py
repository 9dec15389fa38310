"""NF4 weights with double quantisation, quantised share by share. The only user of bitsandbytes, with `linear4bit`.

bitsandbytes scales each block of 64 weights by its largest magnitude. It then subtracts the mean of these scales, and
quantises them to 8 bits in groups of 256. The blocks are independent, so each rank quantises only the blocks it holds.
Mean and groups need the scales of the whole tensor: 1/16 byte per weight.

bitsandbytes takes seconds to import and brings torch's compiler with it: only functions that need it import it.
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
    """Replace every linear layer of the decoder of `model`, on the meta device, by an NF4 layer without weights.

    The head is not changed. `dtype` is the dtype of activations, and the storage dtype of packed weights: ZeRO gathers
    and partitions floating types without changing their bits, but casts other types.
    """
    try:
        from ft_service.model.linear4bit import MemoryEfficientLinear4bit
    except ModuleNotFoundError:
        raise ModelError(
            "method.type = 'qlora': this process was started without 4-bit weights. Start another with four_bit=True."
        ) from None

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name.endswith("lm_head"):
            continue
        linear = MemoryEfficientLinear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=dtype,
            quant_type=_TYPE,
            quant_storage=dtype,
            device="meta",
        )
        # On CPUs with AVX512-BF16, bitsandbytes repacks the weights in place at the first `eval()` forward without
        # gradients (a validation), and nothing unpacks them for training.
        linear.support_avx512bf16_for_cpu = False
        linear.weight = packed_parameter(
            torch.empty(packed_shape(name, module.weight, dtype), dtype=dtype, device="meta")
        )
        linear.bias = module.bias
        model.set_submodule(name, linear)


def packed_shape(name: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of the packed weights in bitsandbytes' layout: two weights per byte, `dtype.itemsize` bytes per element."""
    if weight.numel() % (2 * dtype.itemsize):
        raise ModelError(f"method.type = 'qlora': {name} of shape {list(weight.shape)} cannot be packed. Use lora.")
    return weight.numel() // (2 * dtype.itemsize), 1


def packed_parameter(data: torch.Tensor) -> nn.Parameter:
    """A parameter of weights that are already quantised: bitsandbytes does not quantise them again."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(data, quant_type=_TYPE, quant_storage=data.dtype, bnb_quantized=True)


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether `parameter` holds 4-bit weights; without bitsandbytes imported there are none."""
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(parameter, library.nn.Params4bit)


def is_4bit_linear(module: Any) -> bool:
    """Whether `module` is a layer that `make_linears_4bit` made."""
    ours = sys.modules.get("ft_service.model.linear4bit")
    return ours is not None and type(module) is ours.MemoryEfficientLinear4bit


def quantise(weights: torch.Tensor, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise whole blocks: n flat `weights` -> packed [n / 2 / storage.itemsize], and scales [n / 64] in fp32."""
    packed, scales = torch.ops.bitsandbytes.quantize_4bit.default(weights, NF4_BLOCK, _TYPE, storage)
    return packed.view(-1), scales


def attach_statistics(parameter: Any, linear: Any, scales: torch.Tensor, shape: torch.Size) -> None:
    """Give a parameter the statistics that undo its quantisation, from the scales of the whole tensor.

    The arithmetic is that of `bitsandbytes.functional.quantize_4bit(..., compress_statistics=True)`. `shape` is the
    shape of the weights before packing.
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
    """Bytes of a tensor's statistics: 1 per block, 4 per group of blocks, and the lookup tables."""
    blocks = -(-num_weights // NF4_BLOCK)
    return blocks + 4 * -(-blocks // _SCALES_PER_GROUP) + 4 * (1 + 16 + 256)


def statistics_tensors(parameter: Any) -> list[torch.Tensor]:
    """The tensors of a 4-bit parameter's statistics, for counting memory."""
    state = parameter.quant_state
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
