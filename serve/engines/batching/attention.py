"""Attention of a flattened batch over paged keys and values, as an attention implementation of transformers.

Legend: N tokens of a step, D decoding sequences, S sequences, C slots of the longest context, H query heads,
K key/value heads, G query heads for each key/value head, E head width.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import LlamaConfig
from transformers.modeling_utils import AttentionInterface

from serve.engines.batching.scheduler import Piece
from serve.engines.batching.threads import threads_for

PAGED_ATTENTION = "ft_paged"
PAGE_TOKENS = 256
"""FlashAttention 2 reads pages of multiples of so many tokens only."""
_CAUSAL = (-1, 0)
"""No limit to the left, nothing to the right. A sequence's queries are aligned with the end of its context."""

_WORTH_A_GROUP = 2048
"""Slots of padding that cost about as much as one more call of an attention kernel, on a CPU."""


@dataclass(frozen=True)
class DecodeGroup:
    """Decoding sequences with contexts of similar length: one padded batch."""

    rows: slice | torch.Tensor
    """Their rows in the flattened batch, int64 [D] if they are not neighbours."""
    panels: torch.Tensor
    """int64 [D * K * blocks of the longest context]: see `KeyValueStore`; unused entries repeat the first block."""
    hidden: torch.Tensor
    """What is added to attention scores, [D, 1, 1, C]: 0, or -inf for slots without context."""


@dataclass(frozen=True)
class PrefillChunk:
    """Several tokens of one sequence."""

    rows: slice
    context_length: int
    """The last token of the chunk attends to so many, itself included."""
    panels: torch.Tensor
    """int64 [K * blocks of the context]"""
    hidden: torch.Tensor | None
    """As in `DecodeGroup`, [tokens, context]; None if the chunk is the start of its sequence."""


@dataclass(frozen=True)
class VarlenRows:
    """All sequences, for FlashAttention's kernels."""

    query_offsets: torch.Tensor
    """int32 [S + 1]: where each sequence's rows begin."""
    most_queries: int
    longest_context: int
    pages: "Pages | None"
    """For a kernel that finds keys and values in their blocks; None for one that needs them side by side."""
    context: "PackedContext | None"


@dataclass(frozen=True)
class Pages:
    context_lengths: torch.Tensor
    """int32 [S]"""
    block_table: torch.Tensor
    """int32 [S, blocks of the longest context]"""


@dataclass(frozen=True)
class PackedContext:
    slots: torch.Tensor
    """int64 [tokens of all contexts]: where their keys and values are."""
    offsets: torch.Tensor
    """int32 [S + 1]: where each sequence's begin."""


@dataclass(frozen=True)
class StepLayout:
    """Where the tokens of a step belong. Either `varlen`, or `groups` and `chunks`, cover all of its rows."""

    slots: torch.Tensor
    """int64 [N] or [N * K]: where each token's key and value go, see `KeyValueStore`."""
    groups: tuple[DecodeGroup, ...] = ()
    chunks: tuple[PrefillChunk, ...] = ()
    varlen: VarlenRows | None = None
    _copies: dict[torch.device, "StepLayout"] = field(default_factory=dict, compare=False, repr=False)

    def on(self, device: torch.device) -> "StepLayout":
        """This layout on a layer's device; copied once for each device."""
        if self.slots.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = _moved(replace(self, _copies={}), device)
        return self._copies[device]


class KeyValueStore:
    """Keys and values of every layer in blocks, each layer's on its own device.

    For FlashAttention they are [blocks, block size, K, E], as it wants them. For other kernels they are
    [blocks, K, block size, E]: rows are gathered by panels, a panel being one head's part of one block, into
    [D, K, C, E], which matrix products take without another copy.

    Trap: content that is masked still takes part in the weighted sum, with weight 0. So everything here must be finite:
    it starts as zeros, `clear` overwrites what may not be finite before another sequence gets the block, and padding
    repeats a block of the sequence itself.
    """

    def __init__(
        self, devices: Rows[torch.device], config: LlamaConfig, dtype: torch.dtype, num_blocks: int, block_size: int
    ) -> None:
        """`devices` has one entry per layer; a block has room for `block_size` tokens."""
        heads, width = _heads_and_width(config)
        self.block_size = block_size
        self.dtype = dtype
        self._is_flash = has_flash_attention(devices[0], dtype)
        self._reads_pages = self._is_flash and reads_pages(devices[0], dtype)
        self._num_heads = heads
        shape = (num_blocks, block_size, heads, width) if self._is_flash else (num_blocks, heads, block_size, width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for device in devices]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for device in devices]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def free(self) -> None:
        """Give the memory back. The store is of no use afterwards."""
        self.keys.clear()
        self.values.clear()

    def write(self, layer: int, slots: torch.Tensor, key_KNE: torch.Tensor, value_KNE: torch.Tensor) -> None:
        for pool, new in ((self.keys[layer], key_KNE), (self.values[layer], value_KNE)):
            new_NKE = new.transpose(0, 1)
            if self._is_flash:
                pool.flatten(0, 1).index_copy_(0, slots, new_NKE)
            else:
                pool.flatten(0, 2).index_copy_(0, slots, new_NKE.flatten(0, 1))

    def clear(self, blocks: Rows[int]) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[torch.tensor(blocks, device=tensor.device)] = 0

    def layout(self, pieces: Rows[Piece[Any]], device: torch.device) -> StepLayout:
        """The layout of a step whose rows are the tokens of `pieces`, in order; those of one token come first."""
        slots = torch.tensor(self._slots(pieces))
        if self._is_flash:
            return StepLayout(slots, varlen=self._varlen(pieces)).on(device)
        slots = (slots.unsqueeze(1) + torch.arange(self._num_heads) * self.block_size).flatten()
        num_decoding = sum(piece.num_tokens == 1 for piece in pieces)
        groups = tuple(self._group(pieces, rows) for rows in _similar(self._context_blocks(pieces[:num_decoding])))
        chunks = []
        row = num_decoding
        for piece in pieces[num_decoding:]:
            chunks.append(self._chunk(piece, row))
            row += piece.num_tokens
        return StepLayout(slots, groups, tuple(chunks)).on(device)

    def _slots(self, pieces: Rows[Piece[Any]]) -> list[int]:
        """Of the first head."""
        size = self.block_size
        block_slots = size if self._is_flash else size * self._num_heads
        return [
            piece.sequence.blocks[token // size] * block_slots + token % size
            for piece in pieces
            for token in range(piece.start, piece.end)
        ]

    def _context_blocks(self, pieces: Rows[Piece[Any]]) -> list[int]:
        return [-(-piece.end // self.block_size) for piece in pieces]

    def _block_table(self, pieces: Rows[Piece[Any]], dtype: type) -> np.ndarray:
        counts = self._context_blocks(pieces)
        table: np.ndarray = np.zeros((len(pieces), max(counts)), dtype)
        for index, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
            table[index, :count] = piece.sequence.blocks[:count]
            table[index, count:] = piece.sequence.blocks[0]  # its own: another sequence's may not be finite
        return table

    def _group(self, pieces: Rows[Piece[Any]], rows: list[int]) -> DecodeGroup:
        members = [pieces[row] for row in rows]
        table = torch.from_numpy(self._block_table(members, np.int64))
        lengths = torch.tensor([piece.end for piece in members]).view(-1, 1, 1, 1)
        slots = torch.arange(table.shape[1] * self.block_size)
        hidden = torch.zeros(len(members), 1, 1, len(slots), dtype=self.dtype)
        hidden.masked_fill_(slots >= lengths, float("-inf"))
        are_neighbours = rows[-1] - rows[0] == len(rows) - 1
        place = slice(rows[0], rows[-1] + 1) if are_neighbours else torch.tensor(rows)
        return DecodeGroup(place, self._panels(table), hidden)

    def _panels(self, blocks: torch.Tensor) -> torch.Tensor:
        """[..., blocks] -> [... * K * blocks]"""
        return (blocks.unsqueeze(-2) * self._num_heads + torch.arange(self._num_heads).unsqueeze(1)).flatten()

    def _chunk(self, piece: Piece[Any], row: int) -> PrefillChunk:
        hidden = None
        if piece.start:
            context = torch.arange(piece.end)
            own = torch.arange(piece.start, piece.end).unsqueeze(1)
            hidden = torch.zeros(piece.num_tokens, piece.end, dtype=self.dtype)
            hidden.masked_fill_(context > own, float("-inf"))
        blocks = torch.tensor(piece.sequence.blocks[: -(-piece.end // self.block_size)])
        return PrefillChunk(slice(row, row + piece.num_tokens), piece.end, self._panels(blocks), hidden)

    def _varlen(self, pieces: Rows[Piece[Any]]) -> VarlenRows:
        counts = [piece.num_tokens for piece in pieces]
        lengths = [piece.end for piece in pieces]
        pages = None
        context = None
        if self._reads_pages:
            table = torch.from_numpy(self._block_table(pieces, np.int32))
            pages = Pages(torch.tensor(lengths, dtype=torch.int32), table)
        else:
            within = np.arange(self.block_size)
            slots = [
                (np.array(piece.sequence.blocks)[:, None] * self.block_size + within).reshape(-1)[: piece.end]
                for piece in pieces
            ]
            context = PackedContext(torch.from_numpy(np.concatenate(slots)), _offsets(lengths))
        return VarlenRows(_offsets(counts), max(counts), max(lengths), pages, context)


def bytes_per_block(config: LlamaConfig, dtype: torch.dtype, block_size: int) -> int:
    """Of keys and values of all layers."""
    heads, width = _heads_and_width(config)
    return 2 * config.num_hidden_layers * block_size * heads * width * dtype.itemsize


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


@cache
def reads_pages(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the active FlashAttention reads blocks through a table: version 3 does, and 2 may refuse to."""
    if not has_flash_attention(device, dtype):
        return False
    one = torch.ones(1, dtype=torch.int32, device=device)
    query = torch.zeros(1, 1, 64, dtype=dtype, device=device)
    block = torch.zeros(1, PAGE_TOKENS, 1, 64, dtype=dtype, device=device)
    try:
        varlen_attn(
            query,
            block,
            block,
            torch.cat([one - 1, one]),
            None,
            1,
            1,
            window_size=_CAUSAL,
            seqused_k=one,
            block_table=(one - 1).unsqueeze(0),
        )
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: StepLayout,
    store: KeyValueStore,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Write the step's keys and values, and attend to each sequence's own; the signature is transformers'.

    `query` is [1, H, N, E], `key` and `value` are [1, K, N, E]. Returns [1, N, H, E].
    """
    if attention_mask is not None or dropout:
        raise ValueError("paged attention takes neither a mask nor dropout")
    layer: int = module.layer_idx  # type: ignore[assignment]
    layout = layout.on(query.device)
    store.write(layer, layout.slots, key[0], value[0])
    query_NHE = query[0].transpose(0, 1)
    keys = store.keys[layer]
    values = store.values[layer]
    if layout.varlen:
        return _flash(query_NHE, keys, values, layout.varlen, scaling).unsqueeze(0), None
    pieces = [_decode(query_NHE, keys, values, group, scaling) for group in layout.groups]
    if len(pieces) == 1 and not layout.chunks:
        return pieces[0].unsqueeze(0), None
    out = torch.empty_like(query_NHE, memory_format=torch.contiguous_format)
    for group, piece in zip(layout.groups, pieces, strict=True):
        out[group.rows] = piece
    for chunk in layout.chunks:
        out[chunk.rows] = _prefill(query_NHE, keys, values, chunk, scaling)
    return out.unsqueeze(0), None


def register_paged_attention() -> None:
    """Make `PAGED_ATTENTION` an attention implementation of transformers. Calling it again changes nothing.

    Trap: not with the mask interface, see `ft_service.model.attention.register_packed_attention`.
    """
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)


def _decode(
    query_NHE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup, scaling: float
) -> torch.Tensor:
    """[D, H, E]. The query heads that share a key/value head are one batch of queries: nothing is repeated."""
    query_DHE = query_NHE[group.rows]
    num_rows = len(query_DHE)
    heads = keys.shape[1]
    width = keys.shape[-1]
    key_DKCE = keys.flatten(0, 1).index_select(0, group.panels).view(num_rows, heads, -1, width)
    value_DKCE = values.flatten(0, 1).index_select(0, group.panels).view(num_rows, heads, -1, width)
    query_DKGE = query_DHE.reshape(num_rows, heads, -1, width)
    multiplications = query_DHE.numel() * key_DKCE.shape[2]
    with threads_for(multiplications, query_DHE.device):
        out = _attend(query_DKGE, key_DKCE, value_DKCE, group.hidden, scaling)
    return out.reshape(query_DHE.shape)


def _attend(
    query_DKGE: torch.Tensor, key_DKCE: torch.Tensor, value_DKCE: torch.Tensor, hidden: torch.Tensor, scaling: float
) -> torch.Tensor:
    if query_DKGE.dtype == torch.float32:  # twice as fast on a CPU as the fused kernel, and as exact
        scores_DKGC = torch.matmul(query_DKGE, key_DKCE.transpose(2, 3)).mul_(scaling).add_(hidden)
        return torch.matmul(scores_DKGC.softmax(-1), value_DKCE)
    return F.scaled_dot_product_attention(query_DKGE, key_DKCE, value_DKCE, attn_mask=hidden, scale=scaling)


def _prefill(
    query_NHE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: PrefillChunk, scaling: float
) -> torch.Tensor:
    """[tokens of the chunk, H, E]"""
    query_1HTE = query_NHE[chunk.rows].transpose(0, 1).unsqueeze(0)
    key_1KCE, value_1KCE = (
        pool.flatten(0, 1).index_select(0, chunk.panels).view(1, pool.shape[1], -1, pool.shape[-1])
        for pool in (keys, values)
    )
    key_1KCE = key_1KCE[:, :, : chunk.context_length]
    value_1KCE = value_1KCE[:, :, : chunk.context_length]
    out = F.scaled_dot_product_attention(
        query_1HTE,
        key_1KCE,
        value_1KCE,
        attn_mask=chunk.hidden,
        is_causal=chunk.hidden is None,
        scale=scaling,
        enable_gqa=query_1HTE.shape[1] != key_1KCE.shape[1],
    )
    return out[0].transpose(0, 1)


def _flash(
    query_NHE: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: VarlenRows, scaling: float
) -> torch.Tensor:
    if rows.context:
        keys = keys.flatten(0, 1).index_select(0, rows.context.slots)
        values = values.flatten(0, 1).index_select(0, rows.context.slots)
    out = varlen_attn(
        query_NHE.contiguous(),
        keys,
        values,
        rows.query_offsets,
        rows.context.offsets if rows.context else None,
        rows.most_queries,
        rows.longest_context,
        scale=scaling,
        window_size=_CAUSAL,
        enable_gqa=query_NHE.shape[1] != keys.shape[-2],
        seqused_k=rows.pages.context_lengths if rows.pages else None,
        block_table=rows.pages.block_table if rows.pages else None,
    )
    assert isinstance(out, torch.Tensor)
    return out


def _similar(lengths: Rows[int]) -> list[list[int]]:
    """Indices in groups, so that padding every group to its longest costs less than further groups would."""
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups = []
    while order:
        longest = lengths[order[0]]
        saved = [(len(order) - cut) * (longest - lengths[order[cut]]) for cut in range(len(order))]
        cut = max(range(len(order)), key=saved.__getitem__)
        if saved[cut] < _WORTH_A_GROUP:
            cut = len(order)
        groups.append(sorted(order[:cut]))
        order = order[cut:]
    return groups


def _offsets(counts: Rows[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int32)


def _heads_and_width(config: LlamaConfig) -> tuple[int, int]:
    heads = config.num_key_value_heads or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of a layout, or a part of one, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{item.name: _moved(getattr(value, item.name), device) for item in fields(value)})
    return value
