"""Our linear layers against `F.linear` and bitsandbytes' own layer, bit for bit, and what they keep for backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ft_service.model import cpu_products
from ft_service.model.linear import MemoryEfficientLinear, make_linears_memory_efficient
from ft_service.model.linear4bit import MemoryEfficientLinear4bit

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = {
    "one packed row": ((1, 37, 48), 80),
    "ragged": ((1, 13, 35), 27),
    "several rows": ((3, 5, 64), 96),
    "two dimensions": ((29, 33), 7),
    "one token": ((1, 1, 48), 32),
    "no tokens": ((1, 0, 48), 32),
    "not contiguous": ((2, 17, 40), 24),
}


@pytest.fixture(autouse=True)
def bf16_is_multiplied_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "WIDENED_ON_CPU", set())


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def input_of(name: str, dtype: torch.dtype) -> torch.Tensor:
    shape, _ = SHAPES[name]
    x = random(*shape, dtype=dtype, seed=1)
    if name == "not contiguous":
        x = random(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=1)[..., ::2]
    return x.requires_grad_()


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found.dtype == expected.dtype and torch.equal(found, expected)


def outcome(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Output and gradients of one pass, with the same random gradient for every layer."""
    x = x.detach().as_strided(x.shape, x.stride()).requires_grad_(x.requires_grad)
    for parameter in layer.parameters():
        parameter.grad = None
    y = layer(x)
    y.backward(random(*y.shape, dtype=y.dtype, seed=2))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_linear_layer_equals_f_linear_bit_for_bit(
    shape: str, trained: bool, bias: bool, dtype: torch.dtype
) -> None:
    x = input_of(shape, dtype)
    stock = nn.Linear(x.shape[-1], SHAPES[shape][1], bias=bias, dtype=dtype).requires_grad_(trained)
    ours = MemoryEfficientLinear(stock.in_features, stock.out_features, bias=bias, dtype=dtype).requires_grad_(trained)
    ours.load_state_dict(stock.state_dict())
    expected = outcome(stock, x)
    found = outcome(ours, x)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    if trained:  # the first layer's input needs no gradient
        expected = outcome(stock, x.detach())
        found = outcome(ours, x.detach())
        assert found["x"] is None and all(same(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert same(ours(x), F.linear(x, stock.weight, stock.bias))


def linears_4bit(shape: str, dtype: torch.dtype, bias: bool) -> tuple[Linear4bit, MemoryEfficientLinear4bit]:
    """bitsandbytes' layer, quantised by bitsandbytes, and ours with the same parameters."""
    columns = SHAPES[shape][0][-1]
    rows = SHAPES[shape][1]
    settings: dict[str, Any] = {"bias": bias, "compute_dtype": dtype, "quant_type": "nf4", "quant_storage": dtype}
    stock = Linear4bit(columns, rows, **settings)
    stock.weight = Params4bit(
        random(rows, columns, dtype=dtype, seed=3), requires_grad=False, quant_type="nf4", quant_storage=dtype
    )
    stock = stock.to("cpu").requires_grad_(False)
    if bias:
        stock.bias = nn.Parameter(random(rows, dtype=dtype, seed=4), requires_grad=False)
    ours = MemoryEfficientLinear4bit(columns, rows, **settings)
    ours.weight = stock.weight
    ours.bias = stock.bias
    for layer in (stock, ours):
        layer.support_avx512bf16_for_cpu = False
    assert stock.weight.quant_state.nested
    return stock, ours


EVEN_SHAPES = [name for name, (shape, rows) in SHAPES.items() if shape[-1] * rows % 8 == 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", EVEN_SHAPES)
def test_the_4bit_layer_equals_bitsandbytes_bit_for_bit(shape: str, bias: bool, dtype: torch.dtype) -> None:
    stock, ours = linears_4bit(shape, dtype, bias)
    x = input_of(shape, dtype)
    expected = outcome(stock, x)
    found = outcome(ours, x)
    assert found.keys() == expected.keys() and expected["x"] is not None
    assert all(same(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert same(ours(x), stock(x))
    assert same(ours(x.detach()), stock(x.detach()))
    # Another dtype than the layer computes in.
    other = next(candidate for candidate in DTYPES if candidate != dtype)
    expected = outcome(stock, x.detach().to(other).requires_grad_())
    found = outcome(ours, x.detach().to(other).requires_grad_())
    assert all(same(found[name], expected[name]) for name in expected)


# -- what is kept ----------------------------------------------------------------------------------------------------


def saved_by(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    return saved


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    return {
        "frozen": MemoryEfficientLinear(48, 80, bias=False, dtype=dtype).requires_grad_(False),
        "trained": MemoryEfficientLinear(48, 80, bias=False, dtype=dtype),
        "4-bit": linears_4bit("one packed row", dtype, bias=False)[1],
    }


def test_only_a_trained_layer_saves_its_input() -> None:
    x = input_of("one packed row", torch.bfloat16)
    saved = {name: saved_by(layer, x) for name, layer in layers(torch.bfloat16).items()}
    assert saved["frozen"] == saved["4-bit"] == []
    assert [tensor.data_ptr() for tensor in saved["trained"]] == [x.data_ptr()]


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["frozen", "trained", "4-bit"])
def test_a_weight_can_be_freed_after_forward_and_put_back_for_backward(kind: str, recomputed: bool) -> None:
    layer: Any = layers(torch.float32)[kind]
    x = input_of("one packed row", torch.float32)
    expected = outcome(layer, x)
    whole = layer.weight.detach().clone()
    layer.weight.data = whole.clone()
    gathered = StorageWeakRef(layer.weight.data.untyped_storage())
    # The square saves its own input: recomputation starts with the layer after this one, as in a decoder.
    y = checkpoint(lambda x: layer(x).square(), x, use_reentrant=False) if recomputed else layer(x).square()
    layer.weight.data = torch.empty(0)
    assert gathered.expired()
    layer.weight.data = whole.clone()
    again = StorageWeakRef(layer.weight.data.untyped_storage())
    layer.weight.grad = None
    root = expected["y"]
    assert root is not None
    (grad_x,) = torch.autograd.grad(y, x, random(*y.shape, dtype=y.dtype, seed=2) / (2 * root), retain_graph=True)
    torch.testing.assert_close(grad_x, expected["x"])
    del y
    layer.weight.data = torch.empty(0)
    assert again.expired()


# -- in a model ------------------------------------------------------------------------------------------------------


def test_plain_linear_layers_are_converted_in_place_and_others_left_alone() -> None:
    class Special(nn.Linear):
        pass

    plain = nn.Linear(4, 3)
    special = Special(3, 2)
    model = nn.Sequential(plain, nn.Sequential(special))
    weight = plain.weight
    make_linears_memory_efficient(model)
    assert type(model[0]) is MemoryEfficientLinear and model[0].weight is weight
    assert type(special) is Special
