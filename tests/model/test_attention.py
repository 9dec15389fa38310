"""Packed attention: on a GPU it calls torch's kernel for documents of several lengths, on a CPU one after the other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ft_service.model import attention
from ft_service.model.attention import packed_attention

LENGTHS = [100, 1, 27, 300]
HEADS = 8
HEAD_WIDTH = 64


def attended(dtype: torch.dtype, device: str, key_heads: int) -> list[torch.Tensor]:
    """The result and the gradients of queries, keys and values, on the CPU."""
    tokens = sum(LENGTHS)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, tokens, HEAD_WIDTH) for heads in (HEADS, key_heads, key_heads)]
    gradient = torch.randn(1, tokens, HEADS, HEAD_WIDTH)
    query, key, value = (tensor.to(device, dtype).requires_grad_() for tensor in inputs)
    offsets = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(device, torch.int32)
    result, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, document_lengths=LENGTHS, document_offsets=offsets
    )
    result.backward(gradient.to(device, dtype))
    return [tensor.detach().float().cpu() for tensor in (result, query.grad, key.grad, value.grad)]  # type: ignore[union-attr]


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_attention_is_that_of_fp32(device: str, key_heads: int) -> None:
    exact = attended(torch.float32, "cpu", key_heads)
    for found, expected in zip(attended(torch.bfloat16, device, key_heads), exact, strict=True):
        assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("key_heads", [HEADS, 2])
def test_every_torch_is_called_with_arguments_that_it_has(monkeypatch: pytest.MonkeyPatch, key_heads: int) -> None:
    """Before torch 2.12 the kernel had no argument for fewer key heads."""
    calls: list[tuple[int, ...]] = []

    def before_2_12(
        query: Any,
        key: Any,
        value: Any,
        cu_seq_q: Any,
        cu_seq_k: Any,
        max_q: int,
        max_k: int,
        *,
        scale: Any,
        window_size: Any,
    ) -> Any:
        calls.append((query.shape[1], key.shape[1], max_q, max_k))
        return query

    monkeypatch.setattr(attention, "varlen_attn", before_2_12)
    with torch.device("meta"):
        query = torch.empty(1, HEADS, 10, HEAD_WIDTH, dtype=torch.bfloat16)
        key = torch.empty(1, key_heads, 10, HEAD_WIDTH, dtype=torch.bfloat16)
        offsets = torch.empty(3, dtype=torch.int32)
    result, _ = packed_attention(
        torch.nn.Module(), query, key, key, None, document_lengths=[4, 6], document_offsets=offsets
    )
    assert result.shape == (1, 10, HEADS, HEAD_WIDTH)
    assert calls == [(HEADS, key_heads, 6, 6)]
