"""Causal attention over packed rows: each document attends only to itself, without a [T, T] mask.

Legend: T tokens of all packed documents, H query heads, K key/value heads, E head width.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import AttentionInterface

from ft_service.model.cpu_attention import attention_on_cpu

PACKED_ATTENTION = "ft_packed"
MULTIPLIED_ON_CPU = {torch.bfloat16}
"""Types for which `ft_service.model.cpu_attention` is faster on a CPU than torch's kernel, and needs more memory."""


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_lengths: list[int],
    document_offsets: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention over a flattened micro-batch, with the signature of transformers' attention functions.

    `query` is [1, H, T, E], `key` and `value` are [1, K, T, E]; `document_lengths` adds up to T and `document_offsets`
    (int32, [documents + 1]) is their running sum, from 0. Returns [1, T, H, E].
    """
    if attention_mask is not None or dropout:
        raise ValueError("packed attention takes neither a mask nor dropout")
    if query.device.type != "cpu" and query.dtype in (torch.bfloat16, torch.float16):
        longest = max(document_lengths)
        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        out = varlen_attn(
            q,
            k,
            v,
            document_offsets,
            document_offsets,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # no limit to the left, nothing to the right: causal
            **(allows_grouped_heads(varlen_attn) if q.shape[1] != k.shape[1] else {}),
        )
        assert isinstance(out, torch.Tensor)
        return out.unsqueeze(0), None
    if query.device.type == "cpu" and query.dtype in MULTIPLIED_ON_CPU:
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return attention_on_cpu(query, key, value, document_lengths, scale), None
    enable_gqa = query.shape[1] != key.shape[1]
    # The kernel writes [1, T, H, E], and shows it transposed: joined in its own order, each piece is copied once.
    pieces = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=enable_gqa).transpose(1, 2)
        for q, k, v in zip(*(tensor.split(document_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), None


@cache
def allows_grouped_heads(attend: Callable[..., object]) -> dict[str, Any]:
    """The argument with which `attend` takes fewer key heads than query heads.

    torch's `varlen_attn` has it from torch 2.12 on. Before that, it takes them as it is.
    """
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(attend).parameters else {}


def register_packed_attention() -> None:
    """Make `PACKED_ATTENTION` an attention implementation of transformers. Calling it again changes nothing.

    Trap: it must not be registered with transformers' `AttentionMaskInterface`. An implementation unknown there gets no
    mask at once; for a registered one, transformers first reads from the device whether position_ids are packed.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
