"""Linear layers that read the same input: as a group they compute what they compute one by one, and keep less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ft_service.model.linear import MemoryEfficientLinear, make_linears_memory_efficient
from ft_service.model.linear4bit import MemoryEfficientLinear4bit
from ft_service.model.linear_group import LinearGroup

WIDTH = 32
OUTPUTS = {"q": 48, "k": 16, "v": 24}
TARGETS: dict[str, list[str]] = {"all": ["q", "k", "v"], "some": ["q", "v"], "one": ["k"], "none": []}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank and alpha patterns": {"rank_pattern": {"k": 2, "v": 7}, "alpha_pattern": {"v": 3}},
    "rsLoRA": {"use_rslora": True},
}


class Projections(nn.Module):
    """q, k and v of the same input, with adapters on some of them. Its forward pass calls each."""

    def __init__(self, dtype: torch.dtype, targets: list[str], four_bit: bool = False, **lora: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, width in OUTPUTS.items():
            self.add_module(name, linear_4bit(width, dtype) if four_bit else nn.Linear(WIDTH, width, bias=False))
        self.to(dtype)
        if targets:
            settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | lora
            inject_adapter_in_model(LoraConfig(target_modules=targets, **settings), self)
            for parameter in self.parameters():
                parameter.data = parameter.data.to(dtype)
        self.train()

    @property
    def layers(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in OUTPUTS]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def linear_4bit(width: int, dtype: torch.dtype) -> nn.Module:
    linear = MemoryEfficientLinear4bit(
        WIDTH, width, bias=False, compute_dtype=dtype, quant_type="nf4", quant_storage=dtype
    )
    weights = torch.randn(width, WIDTH).to(dtype)
    linear.weight = Params4bit(weights, requires_grad=False, quant_type="nf4", quant_storage=dtype)
    linear.support_avx512bf16_for_cpu = False
    return linear.to("cpu")


def outcome(module: nn.Module, function: Callable[..., Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one pass, with the same random gradients on every call."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    for parameter in module.parameters():
        parameter.grad = None
    outputs = function(x)
    torch.manual_seed(2)
    gradients = [(output, torch.randn(output.shape).to(output.dtype)) for output in outputs]
    torch.autograd.backward(*zip(*[pair for pair in gradients if pair[0].requires_grad], strict=True))
    found = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found if x.grad is None else found | {"x": x.grad}


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        tolerance = 1e-6 if dtype == torch.float32 else 2**-6
        assert (found[name] - values).abs().max() <= tolerance * values.abs().max(), name


pytestmark = pytest.mark.usefixtures("product_type_on_cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def uninitialised_memory_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_empty(self: torch.Tensor, *shape: Any) -> torch.Tensor:
        return self.new_full(torch.Size(shape if shape and isinstance(shape[0], int) else ()), float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


# -- the same numbers ------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_a_group_computes_what_its_layers_compute(
    dtype: torch.dtype, four_bit: bool, targets: str, adapters: str
) -> None:
    module = Projections(dtype, TARGETS[targets], four_bit, **ADAPTERS[adapters])
    group = LinearGroup(module.layers)
    x = inputs(dtype)
    assert group.can_compute(x)
    assert_near(outcome(module, group, x), outcome(module, module, x), dtype)
    if targets != "none":  # the first layer's input may need no gradient
        assert_near(outcome(module, group, x.detach()), outcome(module, module, x.detach()), dtype)
    with torch.no_grad():
        found, expected = ({f"output {place}": y for place, y in enumerate(run(x))} for run in (group, module))
    assert_near(found, expected, dtype)


@DTYPES
@pytest.mark.parametrize("targets", TARGETS)
def test_weights_of_the_layers_themselves_are_trained_too(dtype: torch.dtype, targets: str) -> None:
    module = Projections(dtype, TARGETS[targets]).requires_grad_(True)
    make_linears_memory_efficient(module)
    group = LinearGroup(module.layers)
    found = outcome(module, group, inputs(dtype))
    assert len(found) == 3 + 1 + 3 + 2 * len(TARGETS[targets])
    assert_near(found, outcome(module, module, inputs(dtype)), dtype)


def test_4bit_weights_are_rounded_to_the_models_type_before_they_are_multiplied() -> None:
    module = Projections(torch.bfloat16, [], four_bit=True)
    layers: list[Any] = module.layers
    x = inputs(torch.bfloat16)
    for layer, found in zip(layers, LinearGroup(layers)(x), strict=True):
        exact = x.double() @ layer.dequantised().double().T
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)  # rounded once


# -- when the layers run one by one ----------------------------------------------------------------------------------


def calls_of(module: Projections, run: Callable[[], Any]) -> int:
    """How many of the layers' own forward passes run."""
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in module.layers]
    run()
    for handle in handles:
        handle.remove()
    return len(calls)


def test_a_hook_on_a_layer_or_inside_it_makes_each_layer_run() -> None:
    module = Projections(torch.float32, ["q", "k"])
    group = LinearGroup(module.layers)
    x = inputs(torch.float32)
    assert calls_of(module, lambda: group(x)) == 3
    assert group.can_compute(x)
    for part in ("q", "v", "k.base_layer", "q.lora_A.default", "k.lora_B.default"):
        handle = module.get_submodule(part).register_forward_pre_hook(lambda *_: None)
        assert not group.can_compute(x), part
        handle.remove()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=lambda settings: "".join(settings))
def test_layers_that_a_group_does_not_know_run_one_by_one(settings: dict[str, Any]) -> None:
    module = Projections(torch.float32, ["q", "v"], **settings)
    group = LinearGroup(module.layers)
    x = inputs(torch.float32)
    assert not group.is_plain and not group.can_compute(x)
    assert_near(outcome(module, group, x), outcome(module, module, x), torch.float32)


def test_a_layer_with_a_bias_runs_by_itself() -> None:
    assert not LinearGroup([nn.Linear(4, 4, bias=False), nn.Linear(4, 4)]).is_plain


def test_adapters_that_are_off_merged_or_drop_their_input_run_one_by_one() -> None:
    module = Projections(torch.float32, ["q", "k", "v"], lora_dropout=0.5)
    group = LinearGroup(module.layers)
    x = inputs(torch.float32)
    torch.manual_seed(3)
    expected = module(x)
    torch.manual_seed(3)
    assert all(torch.equal(one, other) for one, other in zip(group(x), expected, strict=True))
    module.eval()
    assert_near(outcome(module, group, x), outcome(module, module, x), torch.float32)
    key: Any = module.k
    key.enable_adapters(False)
    assert not group.can_compute(x)
    key.enable_adapters(True)
    assert group.can_compute(x)
    key.merge()
    assert not group.can_compute(x)


# -- what is kept ----------------------------------------------------------------------------------------------------


@DTYPES
def test_a_group_saves_its_input_once_and_the_adapters_narrow_product(dtype: torch.dtype) -> None:
    module = Projections(dtype, ["q", "k", "v"])
    x = inputs(dtype)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        LinearGroup(module.layers)(x)
    assert [tensor.shape for tensor in saved] == [x.shape, (18, 12)]
    assert saved[0].data_ptr() == x.data_ptr() and saved[1].dtype == dtype
    saved.clear()
    frozen = Projections(dtype, []).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        LinearGroup(frozen.layers)(x)
    assert saved == []


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["16-bit", "4-bit"])
def test_weights_can_be_freed_after_forward_and_put_back_for_backward(four_bit: bool, recomputed: bool) -> None:
    module = Projections(torch.float32, ["q", "v"], four_bit)
    make_linears_memory_efficient(module)
    assert four_bit or type(module.get_submodule("k")) is MemoryEfficientLinear
    group = LinearGroup(module.layers)
    assert group.can_compute(inputs(torch.float32))

    def run(x: torch.Tensor) -> torch.Tensor:
        outputs = checkpoint(group, x, use_reentrant=False) if recomputed else group(x)
        return torch.cat(outputs, dim=-1)

    expected = outcome(module, lambda x: [run(x)], inputs(torch.float32))
    whole = {parameter: parameter.detach().clone() for parameter in module.parameters()}

    def gather() -> list[StorageWeakRef]:
        for parameter, values in whole.items():
            parameter.data = values.clone()
            parameter.grad = None
        return [StorageWeakRef(parameter.data.untyped_storage()) for parameter in whole]

    def free() -> None:
        for parameter in whole:
            parameter.data = torch.empty(0)

    storages = gather()
    x = inputs(torch.float32)
    y = run(x)
    free()
    assert all(storage.expired() for storage in storages)
    storages = gather()
    torch.manual_seed(2)
    (found,) = torch.autograd.grad(y, x, torch.randn(y.shape), retain_graph=True)
    torch.testing.assert_close(found, expected["x"])
    del y
    free()
    assert all(storage.expired() for storage in storages)
