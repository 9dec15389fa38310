"""Attention over blocks equals attention over each sequence alone, by whichever kernel."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from serve.engines.batching import attention
from serve.engines.batching.attention import KeyValueStore, StepLayout, bytes_per_block, paged_attention
from serve.engines.batching.scheduler import Piece, Sequence

CONFIG = LlamaConfig(
    num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2, head_dim=16, hidden_size=96, vocab_size=8
)
LAYER = SimpleNamespace(layer_idx=0)
CPU = torch.device("cpu")
SCALE = 0.3


def make_store(num_blocks: int = 40, block_size: int = 4, dtype: torch.dtype = torch.float32) -> KeyValueStore:
    return KeyValueStore([CPU], CONFIG, dtype, num_blocks, block_size)


class Contexts:
    """Sequences with random queries, keys and values for every token, in blocks that are spread over the pool."""

    def __init__(self, lengths: list[int], block_size: int = 4, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        free = itertools.chain(range(1, 40, 2), range(0, 40, 2))
        self.sequences = [
            Sequence("", [0] * n, n, 1, blocks=list(itertools.islice(free, -(-n // block_size)))) for n in lengths
        ]
        self.queries = [torch.randn(n, 6, 16, dtype=dtype) for n in lengths]
        self.keys = [torch.randn(n, 2, 16, dtype=dtype) for n in lengths]
        self.values = [torch.randn(n, 2, 16, dtype=dtype) for n in lengths]

    def run(self, store: KeyValueStore, spans: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Attend as one step with tokens ``start`` to ``end`` of sequences; what is before must have been run."""
        pieces = [Piece(self.sequences[which], start, end - start, 0, True) for which, start, end in spans]
        rows = [
            torch.cat([tensors[which][start:end] for which, start, end in spans]).transpose(0, 1).unsqueeze(0)
            for tensors in (self.queries, self.keys, self.values)
        ]
        layout = store.layout(pieces, CPU)
        out, _ = paged_attention(LAYER, *rows, None, layout=layout, store=store, scaling=SCALE)
        return list(out[0].split([end - start for _, start, end in spans]))

    def expected(self, which: int, start: int, end: int) -> torch.Tensor:
        query, key, value = (
            tensors[which][:end].transpose(0, 1).unsqueeze(0) for tensors in (self.queries, self.keys, self.values)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE, enable_gqa=True)
        return out[0].transpose(0, 1)[start:]


STEPS = [
    [(0, 0, 5), (1, 0, 11)],
    [(0, 5, 6), (2, 0, 1), (1, 11, 14), (3, 0, 8)],
    [(0, 6, 7), (1, 14, 15), (2, 1, 2)],
    [(3, 8, 9), (0, 7, 8)],
]


@pytest.mark.parametrize("group_worth", [1, 2048], ids=["grouped by length", "one batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_token_attends_to_its_own_sequence_up_to_itself(monkeypatch, dtype, group_worth):
    monkeypatch.setattr(attention, "_WORTH_A_GROUP", group_worth)
    store = make_store(dtype=dtype)
    contexts = Contexts([9, 16, 3, 9], dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for spans in STEPS:
        for span, out in zip(spans, contexts.run(store, spans), strict=True):
            torch.testing.assert_close(out, contexts.expected(*span), atol=tolerance, rtol=tolerance)


def test_contexts_of_similar_length_are_padded_together():
    assert attention._similar([]) == []
    assert attention._similar([3, 4, 3]) == [[0, 1, 2]]
    assert attention._similar([4, 4000, 5, 4001]) == [[1, 3], [0, 2]]


def test_blocks_that_are_cleared_poison_nobody():
    store = make_store(num_blocks=8)
    contexts = Contexts([6, 3])
    contexts.sequences[0].blocks = [1, 2]
    contexts.sequences[1].blocks = [1]
    contexts.keys[0][:] = float("nan")
    contexts.values[0][:] = float("nan")
    contexts.run(store, [(0, 0, 6)])
    store.clear([1, 2])
    out = contexts.run(store, [(1, 0, 2)])
    out += contexts.run(store, [(1, 2, 3)])
    torch.testing.assert_close(torch.cat(out), contexts.expected(1, 0, 3), atol=1e-5, rtol=1e-5)


def test_padding_reads_no_other_sequence():
    """Block 0 may be of a sequence whose keys and values are not finite."""
    store = make_store(num_blocks=12)
    contexts = Contexts([3, 3, 14])
    contexts.sequences[0].blocks = [0]
    contexts.sequences[1].blocks = [1]
    contexts.sequences[2].blocks = [2, 3, 4, 5]
    contexts.keys[0][:] = float("nan")
    contexts.values[0][:] = float("inf")
    contexts.run(store, [(0, 0, 3), (1, 0, 2), (2, 0, 13)])
    out = contexts.run(store, [(1, 2, 3), (2, 13, 14)])  # one padded batch
    torch.testing.assert_close(out[0], contexts.expected(1, 2, 3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1], contexts.expected(2, 13, 14), atol=1e-5, rtol=1e-5)


def test_a_block_takes_the_bytes_that_the_bound_counts():
    store = make_store(num_blocks=10, block_size=16, dtype=torch.bfloat16)
    assert store.num_bytes == 10 * bytes_per_block(CONFIG, torch.bfloat16, 16)


def fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options) -> torch.Tensor:
    """What the CUDA kernel computes, from the arguments that torch's documentation asks for."""
    assert query.is_contiguous() and query.dim() == 3
    assert options["window_size"] == (-1, 0) and options["enable_gqa"]
    table = options["block_table"]
    lengths = cu_seq_k.diff() if table is None else options["seqused_k"]
    assert {cu_seq_q.dtype, lengths.dtype} == {torch.int32}
    assert len(cu_seq_q) == len(lengths) + 1
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(lengths.max())
    if table is None:
        assert options["seqused_k"] is None and key.dim() == 3 and len(key) == cu_seq_k[-1]
    else:
        assert cu_seq_k is None and table.dtype == torch.int32 and key.dim() == 4
        assert table.shape[1] * key.shape[1] >= max_k
    outs = []
    for index, length in enumerate(lengths.tolist()):
        q = query[cu_seq_q[index] : cu_seq_q[index + 1]].transpose(0, 1)
        k, v = (
            (
                pages[table[index].long()].flatten(0, 1)[:length]
                if table is not None
                else pages[cu_seq_k[index] :][:length]
            ).transpose(0, 1)
            for pages in (key, value)
        )
        hidden = torch.ones(q.shape[1], length).tril(length - q.shape[1]).log()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, scale=options["scale"], enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("reads_pages", [True, False])
def test_flash_attention_gets_what_its_documentation_asks_for(monkeypatch, reads_pages):
    monkeypatch.setattr(attention, "varlen_attn", fake_varlen)
    monkeypatch.setattr(attention, "has_flash_attention", lambda device, dtype: True)
    monkeypatch.setattr(attention, "reads_pages", lambda device, dtype: reads_pages)
    store = make_store()
    assert store.keys[0].shape == (40, 4, 2, 16)
    contexts = Contexts([9, 16, 3, 9])
    for spans in STEPS:
        for span, out in zip(spans, contexts.run(store, spans), strict=True):
            torch.testing.assert_close(out, contexts.expected(*span), atol=1e-5, rtol=1e-5)


def test_only_half_precision_on_cuda_has_flash_attention():
    cuda = torch.device("cuda")
    assert attention.has_flash_attention(cuda, torch.bfloat16)
    assert not attention.has_flash_attention(cuda, torch.float32)
    assert not attention.has_flash_attention(CPU, torch.bfloat16)


def test_a_kernel_that_refuses_pages_is_noticed(monkeypatch):
    def refuse(*_, **options):
        raise RuntimeError("block_table is not supported")

    attention.reads_pages.cache_clear()
    monkeypatch.setattr(attention, "varlen_attn", refuse)
    monkeypatch.setattr(attention, "has_flash_attention", lambda device, dtype: True)
    assert not attention.reads_pages(CPU, torch.bfloat16)
    attention.reads_pages.cache_clear()


def test_a_layout_is_copied_once_for_each_further_device():
    store = make_store()
    layout = store.layout([Piece(Sequence("", [0] * 9, 9, 1, blocks=[0, 1, 2]), 4, 5, 0, True)], CPU)
    assert layout.on(CPU) is layout
    meta = torch.device("meta")
    copy = layout.on(meta)
    assert copy is layout.on(meta)
    assert isinstance(copy, StepLayout)
    assert {copy.slots.device, copy.chunks[0].panels.device, copy.chunks[0].hidden.device} == {meta}
