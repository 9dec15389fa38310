"""Causal attention of packed documents in bf16 on a CPU, as matrix products over several documents.

torch's own kernel for a CPU multiplies small blocks, and is slow at the lengths of chats, above all backward. Here,
documents of similar lengths form a group, padded to its longest. As in that kernel, scores and softmax are fp32,
and probabilities are rounded to bf16 before they are multiplied, if the processor multiplies bf16.

Legend: T tokens, H query heads, K key/value heads, G = H / K, E head width; R rows: the tokens, in the order of groups,
with padding. Of a group: N documents of L rows; n queries of each attend to its first m keys. S = scaling q k^T
[N K, G n, m], P = softmax(S), o = P v.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ft_service.model.cpu_products import product_dtype

_SCORE_BYTES = 1024 * 1024
"""Of the fp32 scores that exist at a time, which stay in a CPU's caches."""
_BLOCK_ROWS = 128
"""Most queries of a document at a time. Fewer compute fewer scores of later keys, but in more operations."""
_FEWEST_ROWS = 16
_MOST_PADDING = 0.2
"""Of a document; at least `_FEWEST_ROWS` rows."""


def attention_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, document_lengths: list[int], scaling: float
) -> torch.Tensor:
    """`query` [1, H, T, E], `key` and `value` [1, K, T, E], all bf16 -> [1, T, H, E]; lengths add up to T."""
    layout = _layout(tuple(document_lengths), query.shape[1])
    result: torch.Tensor = _Attention.apply(query, key, value, layout, scaling)
    return result


class _Attention(torch.autograd.Function):
    """Saves its inputs, and computes P again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: "_Layout", scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.layout = layout
        ctx.scaling = scaling
        q, k, v = (layout.padded(x.squeeze(0).transpose(0, 1)) for x in (query, key, value))
        output = torch.empty_like(q)
        for group in layout.groups:
            keys = group.keys(k).float().mul_(scaling)
            values = group.keys(v).to(product_dtype(v))
            for queries in group.blocks:
                p = _probabilities(group.queries(q, queries, k.shape[1]), keys[:, : queries.stop], queries)
                group.write(output, queries, k.shape[1], torch.bmm(p.to(values.dtype), values[:, : queries.stop]))
        return layout.unpadded(output).unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # With g = dL/do:  dL/dv = P^T g,  dP = g v^T,  dS = P (dP - sum(P dP)),
        # dL/dq = scaling dS k,  dL/dk = scaling dS^T q.
        query, key, value = ctx.saved_tensors
        layout: _Layout = ctx.layout
        q, k, v = (layout.padded(x.squeeze(0).transpose(0, 1)) for x in (query, key, value))
        g = layout.padded(gradients[0].squeeze(0)).index_fill_(0, layout.padding, 0)
        kv_heads = k.shape[1]
        dtype = product_dtype(q)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for group in layout.groups:
            keys = group.keys(k).to(dtype)
            scaled_keys = keys.float() * ctx.scaling
            scaled_values = group.keys(v).float().mul_(ctx.scaling)  # so that dS is scaled, and nothing else has to be
            grad_keys = torch.zeros_like(scaled_keys)
            grad_values = torch.zeros_like(scaled_keys)
            for queries in group.blocks:
                m = queries.stop
                wide_q = group.queries(q, queries, kv_heads)
                wide_g = group.queries(g, queries, kv_heads)
                p = _probabilities(wide_q, scaled_keys[:, :m], queries)
                grad_p = torch.bmm(wide_g, scaled_values[:, :m].transpose(1, 2))
                torch.ops.aten._softmax_backward_data.out(grad_p, p, -1, torch.float32, grad_input=grad_p)
                grad_s = grad_p.to(dtype)
                grad_values[:, :m] += torch.bmm(p.to(dtype).transpose(1, 2), wide_g.to(dtype))
                grad_keys[:, :m] += torch.bmm(grad_s.transpose(1, 2), wide_q.to(dtype))
                group.write(grad_q, queries, kv_heads, torch.bmm(grad_s, keys[:, :m]))
            group.write_keys(grad_k, grad_keys)
            group.write_keys(grad_v, grad_values)
        return *(layout.unpadded(x).transpose(0, 1).unsqueeze(0) for x in (grad_q, grad_k, grad_v)), None, None


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, block: slice) -> torch.Tensor:
    """P [N K, G n, m] in fp32, of `queries` [N K, G n, E] and scaled `keys` [N K, m, E]."""
    n = block.stop - block.start
    scores = torch.bmm(queries, keys.transpose(1, 2))
    # The last n keys are the queries' own.
    scores.view(len(keys), -1, n, keys.shape[1])[..., block.start :] += _later_keys()[:n, :n]
    return torch.softmax(scores, dim=-1, out=scores)


@lru_cache(maxsize=1)
def _later_keys() -> torch.Tensor:
    """-inf where a key comes after the query."""
    return torch.full((_BLOCK_ROWS, _BLOCK_ROWS), -math.inf).triu(1)


# -- groups of documents ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    rows: slice
    """Among all R."""
    documents: int
    """N"""
    blocks: tuple[slice, ...]
    """Queries of each document."""

    def _by_document(self, x: torch.Tensor) -> torch.Tensor:
        """[R, heads, E] -> [N, heads, L, E]"""
        return x[self.rows].unflatten(0, (self.documents, -1)).transpose(1, 2)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[R, K, E] -> [N K, L, E]"""
        return self._by_document(x).flatten(0, 1)

    def write_keys(self, x: torch.Tensor, part: torch.Tensor) -> None:
        """Into [R, K, E], from [N K, L, E]."""
        self._by_document(x).copy_(part.unflatten(0, (self.documents, -1)))

    def queries(self, x: torch.Tensor, block: slice, kv_heads: int) -> torch.Tensor:
        """[R, H, E] -> fp32 [N K, G n, E]: the queries that share keys are together."""
        part = self._by_document(x)[:, :, block].to(torch.float32, memory_format=torch.contiguous_format)
        return part.view(self.documents * kv_heads, -1, x.shape[-1])

    def write(self, x: torch.Tensor, block: slice, kv_heads: int, part: torch.Tensor) -> None:
        """Into [R, H, E], from [N K, G n, E]."""
        to = self._by_document(x)[:, :, block]
        to.copy_(part.view(to.shape))


@dataclass(frozen=True)
class _Layout:
    groups: tuple[_Group, ...]
    tokens: torch.Tensor
    """Of each row [R]; of padding, any token."""
    padding: torch.Tensor
    """Rows that are none."""
    rows: torch.Tensor
    """Of each token [T]."""

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, E] -> [R, heads, E]"""
        return x.index_select(0, self.tokens)

    def unpadded(self, x: torch.Tensor) -> torch.Tensor:
        """[R, heads, E] -> [T, heads, E]"""
        return x.index_select(0, self.rows)


@lru_cache(maxsize=2)
def _layout(lengths: tuple[int, ...], heads: int) -> _Layout:
    """Groups of documents of similar length, the longest first."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    left = sorted(range(len(lengths)), key=lambda document: -lengths[document])
    groups = []
    tokens = []
    padding = []
    rows = torch.empty(starts[-1], dtype=torch.int64)
    row = 0
    while left:
        longest = lengths[left[0]]
        step = min(_BLOCK_ROWS, max(_FEWEST_ROWS, _SCORE_BYTES // (4 * heads * longest)))
        step = -(-longest // -(-longest // step))  # blocks of equal size
        most = max(1, _SCORE_BYTES // (4 * heads * step * longest))
        padding_limit = max(_FEWEST_ROWS, _MOST_PADDING * longest)
        members = [document for document in left[:most] if longest - lengths[document] <= padding_limit]
        left = left[len(members) :]
        first_row = row
        for document in members:
            length = lengths[document]
            own = torch.arange(longest)
            tokens.append(starts[document] + own.clamp(max=length - 1))
            padding.append(row + own[length:])
            rows[starts[document] : starts[document + 1]] = row + own[:length]
            row += longest
        queries = tuple(slice(start, min(start + step, longest)) for start in range(0, longest, step))
        groups.append(_Group(slice(first_row, row), len(members), queries))
    return _Layout(tuple(groups), torch.cat(tokens), torch.cat(padding), rows)
