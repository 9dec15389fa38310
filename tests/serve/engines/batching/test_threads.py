"""Small matrix products take one thread, and what follows has all of them again."""

from collections.abc import Iterator

import pytest
import torch

from serve.engines.batching.threads import threads_for

CPU = torch.device("cpu")
SMALL = 10_000
LARGE = 10**9


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("multiplications", "device", "threads"),
    [(SMALL, "cpu", 1), (LARGE, "cpu", 2), (SMALL, "cuda", 2)],
)
def test_only_small_products_of_a_cpu_take_one_thread(multiplications, device, threads):
    with threads_for(multiplications, torch.device(device)):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_a_product_that_fails_leaves_all_threads_to_the_next():
    with pytest.raises(ValueError, match="shapes"), threads_for(SMALL, CPU):
        raise ValueError("shapes")
    assert torch.get_num_threads() == 2
