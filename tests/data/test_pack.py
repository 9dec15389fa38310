"""Packing and order: every example in one row, every row once an epoch, the same stream for every batch size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ft_service.data.order import step_rows
from ft_service.data.pack import pack_lengths

ROW = 64
lengths_lists = st.lists(st.integers(1, ROW), max_size=200)


def row_sums(rows: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[example] for example in row) for row in rows]


@given(lengths=lengths_lists)
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = pack_lengths(np.array(lengths, dtype=np.int64), ROW)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(0 < total <= ROW for total in row_sums(rows, lengths))


@given(lengths=lengths_lists)
def test_the_same_lengths_give_the_same_rows(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int64)
    assert pack_lengths(array, ROW) == pack_lengths(array.copy(), ROW)


@given(lengths=lengths_lists)
def test_no_two_rows_fit_into_one(lengths: list[int]) -> None:
    """Best-fit opens a row only for an example that no open row takes, so any two rows together overflow one."""
    smallest = sorted(row_sums(pack_lengths(np.array(lengths, dtype=np.int64), ROW), lengths))[:2]
    assert len(smallest) < 2 or sum(smallest) > ROW


def test_an_example_goes_into_the_fullest_row_with_room() -> None:
    # 6 and 5 open rows with room for 4 and 5; 4 fits both, and fills the first
    assert pack_lengths(np.array([4, 5, 6]), 10) == [[2, 0], [1]]


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens does not fit into a row of 64"):
        pack_lengths(np.array([3, 65]), ROW)


def test_short_examples_fill_98_percent_of_rows_of_2048() -> None:
    lengths = np.random.default_rng(0).integers(40, 600, size=2000)
    rows = pack_lengths(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) >= 0.98


# -- order -------------------------------------------------------------------------------------------------------------


def stream(seed: int, batch: int, num_rows: int, length: int) -> list[int]:
    steps = -(-length // batch)
    return np.concatenate([step_rows(seed, step, batch, num_rows) for step in range(steps)]).tolist()[:length]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 30), batch=st.integers(1, 70))
def test_every_epoch_is_a_permutation_and_batches_span_epochs(seed: int, num_rows: int, batch: int) -> None:
    order = stream(seed, batch, num_rows, 3 * num_rows)
    for epoch in range(3):
        assert sorted(order[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 30), batch=st.integers(1, 70), other=st.integers(1, 70))
def test_the_stream_of_rows_is_the_same_for_every_batch_size(seed: int, num_rows: int, batch: int, other: int) -> None:
    assert stream(seed, batch, num_rows, 100) == stream(seed, other, num_rows, 100)


def test_a_single_step_has_the_rows_it_has_in_a_run() -> None:
    run = [step_rows(7, step, 4, 10).tolist() for step in range(12)]
    assert [step_rows(7, step, 4, 10).tolist() for step in reversed(range(12))] == run[::-1]


def test_epochs_and_seeds_differ_in_order() -> None:
    first = stream(0, 50, 50, 100)[:50]
    second = stream(0, 50, 50, 100)[50:]
    assert first != second
    assert first != stream(1, 50, 50, 50)
    assert first != list(range(50))


def test_a_batch_is_complete_and_int64() -> None:
    rows = step_rows(0, 5, 16, 3)
    assert rows.shape == (16,) and rows.dtype == np.int64
