"""Matrix products of bf16 matrices on a CPU that cannot multiply bf16: in fp32.

Most processors without AMX or avx512_bf16 multiply fp32 three to four times as fast as they emulate bf16. The product
of two bf16 numbers is exact in fp32, so only the order of sums differs, and a result is rounded once.
"""

import platform

import torch


def _multiplies_bf16() -> bool:
    """Whether this machine's CPU has instructions for it."""
    if platform.machine() in ("x86_64", "AMD64"):
        # Trap: oneDNN also says that it supports bf16 where it emulates it. Every processor with AMX has avx512_bf16.
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


WIDENED_ON_CPU = set() if _multiplies_bf16() else {torch.bfloat16}
"""Types whose matrices a CPU multiplies as fp32."""


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The type in which matrices of the type and device of `x` are multiplied."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in WIDENED_ON_CPU else x.dtype


def for_product(x: torch.Tensor) -> torch.Tensor:
    """`x` in its `product_dtype`: `x` itself, except on a CPU that cannot multiply its type."""
    return x if product_dtype(x) == x.dtype else x.float()
