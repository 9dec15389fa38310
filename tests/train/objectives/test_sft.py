"""Loss, packed attention, batches and learning rate, each compared with a stock implementation or with arithmetic."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from ft_service.data.order import step_rows
from ft_service.model import cpu_products
from ft_service.model.attention import PACKED_ATTENTION, register_packed_attention
from ft_service.train.batches import Batches, MicroBatch, Step, collate, loss_positions
from ft_service.train.objectives import sft as loss_module
from ft_service.train.objectives.sft import LossModel, chunked_cross_entropy
from ft_service.train.schedule import learning_rate

N, D, V = 7, 5, 11


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    loss_mask: np.ndarray
    document_lengths: np.ndarray


def a_row(*lengths: int, first_id: int = 0, mask: list[bool] | None = None) -> Row:
    """Token ids that count up from `first_id`, so that each token says where it came from."""
    total = sum(lengths)
    return Row(
        np.arange(first_id, first_id + total, dtype=np.int32),
        np.ones(total, dtype=bool) if mask is None else np.array(mask),
        np.array(lengths, dtype=np.int32),
    )


# -- chunked cross entropy -------------------------------------------------------------------------------------------


def chunks_of(rows: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module._CHUNK_BYTES, "cpu", rows * 4 * vocabulary)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


def stock(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


@pytest.mark.usefixtures("product_type_on_cpu")
# bf16 keeps 8 bits: gradients of size about 3, rounded a few times, agree to a few 2^-8.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("chunk_rows", "block_rows"), [(1, 1), (3, 2), (N, N), (100, 100), (N, 5), (100, 1)])
def test_loss_and_gradients_match_stock_cross_entropy(
    chunk_rows: int, block_rows: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(chunk_rows, V, monkeypatch)
    monkeypatch.setitem(loss_module._BLOCK_BYTES, "cpu", block_rows * 4 * V)
    hidden, weight, targets = tensors(dtype)
    found, _ = chunked_cross_entropy(hidden, weight, targets)
    expected = stock(hidden, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the same bf16 logits, the same fp32 softmax
    # Scaled, as the loop scales by tokens and workers.
    found_gradients = torch.autograd.grad(found * 0.5, [hidden, weight])
    expected_gradients = torch.autograd.grad(expected * 0.5, [hidden, weight])
    for gradient, wanted in zip(found_gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_right_predictions_are_those_of_the_highest_logit(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(chunk_rows, V, monkeypatch)
    hidden, weight, targets = tensors()
    most_likely = (hidden @ weight.T).argmax(dim=1)
    targets = torch.where(torch.arange(N) % 3 == 0, most_likely, (most_likely + 1) % V)
    _, correct = chunked_cross_entropy(hidden, weight, targets)
    assert correct.item() == len(range(0, N, 3))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, targets = tensors()
    weight.requires_grad_(False)
    chunked_cross_entropy(hidden, weight, targets)[0].backward()
    assert weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_without_targets_loss_and_gradients_are_zero() -> None:
    hidden, weight, targets = tensors()
    loss, correct = chunked_cross_entropy(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert correct.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


class LargestTensor(TorchDispatchMode):
    """Inside, records the size of the largest tensor that an operation returns, of any type or of `dtype`."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.elements = 0
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if self._counts(leaf)]
        self.elements = max(self.elements, *sizes, 0)
        return result

    def _counts(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and self._dtype in (None, leaf.dtype)


def test_all_logits_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, vocabulary = 64, 4, 512
    chunks_of(8, vocabulary, monkeypatch)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    with LargestTensor() as largest:
        chunked_cross_entropy(hidden, weight, targets)[0].backward()
    assert largest.elements == 8 * vocabulary  # a chunk's logits; [N, V] would be eight times as many
    with LargestTensor() as largest:
        stock(hidden, weight, targets).backward()
    assert largest.elements == rows * vocabulary  # the measure sees them where they are


def test_few_rows_of_logits_are_fp32_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "WIDENED_ON_CPU", set())
    width, vocabulary = 4, 512
    chunks_of(8, vocabulary, monkeypatch)
    monkeypatch.setitem(loss_module._BLOCK_BYTES, "cpu", 2 * 4 * vocabulary)
    hidden = torch.randn(64, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16)
    with LargestTensor(torch.float32) as largest:
        chunked_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.int64))[0].backward()
    assert largest.elements == 2 * vocabulary


# -- packed attention ------------------------------------------------------------------------------------------------


def a_llama(num_kv_heads: int, attention: str) -> LlamaForCausalLM:
    register_packed_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def packed_logits(model: LlamaForCausalLM, batch: MicroBatch) -> torch.Tensor:
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        document_lengths=batch.document_lengths,
        document_offsets=batch.document_offsets,
    ).logits[0]


def random_rows() -> list[Row]:
    rng = np.random.default_rng(0)
    shapes = [(5, 1, 9), (12,), (3, 4)]
    return [
        Row(rng.integers(0, 50, sum(s)).astype(np.int32), rng.random(sum(s)) < 0.7, np.array(s, dtype=np.int32))
        for s in shapes
    ]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_packed_documents_have_the_logits_of_separate_ones(num_kv_heads: int) -> None:
    batch = collate(random_rows())
    found = packed_logits(a_llama(num_kv_heads, PACKED_ATTENTION), batch)
    stock_model = a_llama(num_kv_heads, "sdpa")
    with torch.no_grad():
        pieces = batch.input_ids.split(batch.document_lengths, dim=1)
        expected = torch.cat([stock_model(input_ids=piece).logits[0] for piece in pieces])
    assert expected.std() > 0.1  # flat logits would agree whatever is attended to
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_documents_do_not_attend_to_each_other() -> None:
    model, (row, *_) = a_llama(2, PACKED_ATTENTION), random_rows()
    before = packed_logits(model, collate([row]))
    changed = Row(
        np.where(np.arange(15) == 2, (row.input_ids + 1) % 50, row.input_ids), row.loss_mask, np.array([5, 1, 9])
    )
    after = packed_logits(model, collate([changed]))
    same = (before == after).all(dim=1)
    # In document 1 nothing before token 2 sees it, everything from there on does; documents 2 and 3 do not.
    assert same.tolist() == [True, True, False, False, False] + [True] * 10


def test_packed_loss_is_the_sum_of_stock_losses_per_document() -> None:
    rows = random_rows()
    model = a_llama(2, PACKED_ATTENTION)
    found, correct = LossModel(model, model)(collate(rows))
    stock_model, expected = a_llama(2, "sdpa"), 0.0
    expected_correct = 0
    for row in rows:
        ends = np.cumsum(row.document_lengths)
        for start, end in zip(ends - row.document_lengths, ends, strict=True):
            ids, mask = torch.from_numpy(row.input_ids[start:end]).long(), torch.from_numpy(row.loss_mask[start:end])
            with torch.no_grad():
                logits = stock_model(input_ids=ids[None]).logits[0, :-1]
            expected += float(F.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum"))
            expected_correct += int((logits.argmax(-1) == ids[1:])[mask[1:]].sum())
    assert correct.item() == expected_correct
    assert found.item() == pytest.approx(expected, rel=1e-5)


# -- micro-batches ---------------------------------------------------------------------------------------------------


def test_positions_restart_in_every_document() -> None:
    batch = collate([a_row(3, 2), a_row(4)])
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.document_lengths == [3, 2, 4]
    assert batch.document_offsets.tolist() == [0, 3, 5, 9]
    assert batch.document_offsets.dtype == torch.int32


def test_a_target_is_the_next_token_of_the_same_document() -> None:
    batch = collate([a_row(3, 2), a_row(4, first_id=100)])
    ids = batch.input_ids[0]
    assert batch.targets.tolist() == [1, 2, 4, 101, 102, 103]  # neither 0, 3 nor 100: they open a document
    assert (ids[batch.target_positions] + 1).tolist() == batch.targets.tolist()


def test_only_loss_tokens_are_targets() -> None:
    mask = [True, False, True, True, False]
    assert loss_positions(a_row(3, 2, mask=mask)).tolist() == [2]
    assert collate([a_row(3, 2, mask=mask)]).targets.tolist() == [2]


def test_a_row_without_loss_tokens_has_no_targets() -> None:
    batch = collate([a_row(1, 1, 1)])
    assert len(batch.targets) == len(batch.target_positions) == 0


# -- the batches of all workers --------------------------------------------------------------------------------------


def rows_in_table(count: int) -> list[Row]:
    """Rows of 2 or 3 tokens; the first id identifies a row."""
    return [a_row(2 + number % 2, first_id=number * 10) for number in range(count)]


def all_workers(rows: list[Row], world_size: int, micro: int, accumulation: int = 1, seed: int = 3) -> list[Batches]:
    batch = world_size * micro * accumulation
    return [Batches(rows, seed, batch, micro, rank, world_size) for rank in range(world_size)]


def rows_seen(batch: MicroBatch) -> list[int]:
    return [int(i) // 10 for i in batch.input_ids[0][batch.position_ids[0] == 0]]


sizes = st.integers(1, 4)


@given(world_size=sizes, micro=sizes, accumulation=sizes, step=st.integers(0, 20), count=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_workers_and_micro_steps_cover_a_step_exactly_once(
    world_size: int, micro: int, accumulation: int, step: int, count: int
) -> None:
    rows = rows_in_table(count)
    shares = [worker.step(step) for worker in all_workers(rows, world_size, micro, accumulation)]
    assert {len(share.micro_batches) for share in shares} == {accumulation}
    # Micro-step by micro-step, and within one by rank: the order of the step, for every layout.
    seen = [row for k in range(accumulation) for share in shares for row in rows_seen(share.micro_batches[k])]
    assert seen == step_rows(3, step, world_size * micro * accumulation, count).tolist()
    assert_counts(shares, [rows[row] for row in seen])


def assert_counts(shares: list[Step], rows: list[Row]) -> None:
    for share in shares:
        assert share.global_tokens == sum(len(row.input_ids) for row in rows)
        assert share.global_loss_tokens == sum(len(row.input_ids) - 1 for row in rows)  # one document a row
    targets = sum(len(batch.targets) for share in shares for batch in share.micro_batches)
    assert targets == shares[0].global_loss_tokens


@given(world_size=sizes, micro=sizes, count=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_validation_covers_every_row_once_for_any_world_size(world_size: int, micro: int, count: int) -> None:
    rows = rows_in_table(count)
    steps = list(zip(*(worker.in_order() for worker in all_workers(rows, world_size, micro)), strict=True))
    seen: list[int] = []
    for shares in steps:
        batches = [batch for share in shares for batch in share.micro_batches]
        assert len(batches) == world_size  # collectives need every worker, one without a row of its own too
        here = [row for batch in batches if len(batch.targets) for row in rows_seen(batch)]
        assert_counts(list(shares), [rows[row] for row in here])
        seen += here
    assert seen == list(range(count))


# -- learning rate ---------------------------------------------------------------------------------------------------


def rates(schedule: Any, num_steps: int = 10, warmup: int = 2, min_ratio: float = 0.0) -> list[float]:
    return [
        learning_rate(step, peak=1e-2, num_steps=num_steps, warmup_steps=warmup, schedule=schedule, min_ratio=min_ratio)
        for step in range(num_steps)
    ]


def test_warmup_rises_linearly_to_the_peak() -> None:
    for schedule in ("cosine", "linear", "constant"):
        assert rates(schedule, warmup=4)[:5] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])


def test_linear_schedule_falls_by_equal_amounts() -> None:
    assert rates("linear")[2:] == pytest.approx([1e-2 * (8 - k) / 8 for k in range(8)])


def test_cosine_schedule_matches_sgdr() -> None:
    expected = [0.5e-2 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates("cosine")[2:] == pytest.approx(expected)
    assert rates("cosine")[6] == pytest.approx(0.5e-2)  # half the peak, half the way


def test_constant_schedule_stays_at_the_peak() -> None:
    assert rates("constant")[2:] == [1e-2] * 8


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_end_at_the_minimum_ratio(schedule: Any) -> None:
    def at(step: int) -> float:
        return learning_rate(step, peak=1e-2, num_steps=10, warmup_steps=0, schedule=schedule, min_ratio=0.1)

    assert at(0) == pytest.approx(1e-2)
    assert at(5) == pytest.approx(0.55e-2)  # half-way between 1e-2 and 1e-3
    assert at(10) == at(11) == pytest.approx(1e-3)


def test_a_run_can_consist_of_warmup_only() -> None:
    assert rates("cosine", num_steps=3, warmup=3) == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
