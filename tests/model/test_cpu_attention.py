"""Attention on a CPU against stock attention of each document by itself."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from ft_service.model import cpu_attention
from ft_service.model.attention import packed_attention

HEADS = 6
WIDTH = 16
SCALING = 0.3
LENGTHS = {
    "one document": [70],
    "padded documents": [30, 1, 33, 2, 31, 1],
    "documents longer than a block": [100, 3, 95, 64],
}
NAMES = ["output", "query", "key", "value"]


pytestmark = pytest.mark.usefixtures("product_type_on_cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that short documents are split and grouped too."""
    monkeypatch.setattr(cpu_attention, "_BLOCK_ROWS", 32)
    monkeypatch.setattr(cpu_attention, "_SCORE_BYTES", 4 * HEADS * 32 * 100)
    cpu_attention._layout.cache_clear()
    yield
    cpu_attention._layout.cache_clear()


def inputs(tokens: int, kv_heads: int) -> list[torch.Tensor]:
    """Queries, keys, values, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, tokens, heads, WIDTH, generator=generator) for heads in (HEADS, kv_heads, kv_heads, HEADS)
    ]
    return [tensor.bfloat16() for tensor in tensors]


def stock(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING, enable_gqa=True)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    output, _ = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        document_lengths=lengths,
        document_offsets=offsets,
        scaling=SCALING,
    )
    return output


def output_and_gradients(
    attend: Callable[..., torch.Tensor], dtype: torch.dtype, lengths: list[int], kv_heads: int
) -> list[torch.Tensor]:
    *by_token, gradient = (tensor.to(dtype) for tensor in inputs(sum(lengths), kv_heads))
    by_head = [tensor.transpose(1, 2).detach().requires_grad_() for tensor in by_token]
    output = attend(*by_head, lengths)
    return [output, *torch.autograd.grad(output, by_head, gradient)]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients_are_as_close_to_fp64_as_those_of_the_stock_kernel(
    lengths: list[int], kv_heads: int
) -> None:
    exact = output_and_gradients(stock, torch.float64, lengths, kv_heads)
    found = output_and_gradients(packed, torch.bfloat16, lengths, kv_heads)
    for name, wanted, ours in zip(NAMES, exact, found, strict=True):
        assert ours.dtype == torch.bfloat16 and ours.shape == wanted.shape
        # bf16 keeps 8 bits: an error of 2^-9 at most in each of a few roundings.
        error = (ours - wanted).norm() / wanted.norm()
        assert error < 0.005, f"{name}: {error:.4f}"


def test_similar_documents_are_computed_together() -> None:
    layout = cpu_attention._layout((30, 1, 33, 2, 31, 1), HEADS)
    assert [group.documents for group in layout.groups] == [3, 3]
    # Rows 0 to 98 are three documents of up to 33 tokens, and the other six are three of up to two.
    assert layout.padding.tolist() == [64, 65, 96, 97, 98, 102, 104]
    assert layout.tokens.shape == (3 * 33 + 3 * 2,)


def test_a_long_document_has_few_scores_at_a_time() -> None:
    (group,) = cpu_attention._layout((1000,), HEADS).groups
    assert {block.stop - block.start for block in group.blocks[:-1]} == {16}
    assert group.blocks[-1].stop == 1000
