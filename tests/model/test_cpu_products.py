"""Matrix products of bf16 matrices on a CPU without bf16 units."""

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from ft_service.model import cpu_products
from ft_service.model.cpu_products import for_product
from ft_service.model.linear import MemoryEfficientLinear

CPU_FACTS = Path("/proc/cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPU_FACTS.exists(), reason="reads the kernel's flags of x86")
def test_bf16_is_widened_where_the_kernel_names_no_bf16_instructions() -> None:
    flags = next(line for line in CPU_FACTS.read_text().splitlines() if line.startswith("flags")).split()
    assert (set() if "avx512_bf16" in flags else {torch.bfloat16}) == cpu_products.WIDENED_ON_CPU


def test_only_bf16_on_a_cpu_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "WIDENED_ON_CPU", {torch.bfloat16})
    x = torch.ones(2, 2, dtype=torch.bfloat16)
    assert for_product(x).dtype == torch.float32
    assert all(for_product(other) is other for other in (x.float(), x.double(), x.to("meta")))
    monkeypatch.setattr(cpu_products, "WIDENED_ON_CPU", set())
    assert for_product(x) is x


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_widened_linear_layer_rounds_each_result_once(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "WIDENED_ON_CPU", {torch.bfloat16})
    torch.manual_seed(0)
    ours = MemoryEfficientLinear(33, 20, dtype=torch.bfloat16).requires_grad_(trained)
    exact = nn.Linear(33, 20, dtype=torch.float64).requires_grad_(trained)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 33).bfloat16().requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    gradient = torch.randn(2, 7, 20).bfloat16()
    outputs = (ours(x), exact(wide_x))
    outputs[0].backward(gradient)
    outputs[1].backward(gradient.double())
    with torch.no_grad():
        assert torch.equal(ours(x), outputs[0])
    pairs = [outputs, (x.grad, wide_x.grad)]
    pairs += [(mine.grad, true.grad) for mine, true in zip(ours.parameters(), exact.parameters(), strict=True)]
    assert len([found for found, _ in pairs if found is not None]) == (4 if trained else 2)
    for found, wanted in pairs:
        if found is not None and wanted is not None:
            assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
            torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-5)
