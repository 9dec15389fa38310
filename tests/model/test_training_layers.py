"""The layers of a model in training, compared with stock transformers and peft in values, gradients and traffic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.scale_counts import predicted_tokens_per_second
from ft_service.catalog import models
from ft_service.model.training_layers import rms_norm, rotate, swiglu, use_training_layers
from tests.counts import Traffic
from tests.model.layer_cases import layer_counts

TOKENS = 8192


def values_and_gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The result, and its gradient to every input that needs one, for a fixed random gradient of the result."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    result = function(*leaves)
    torch.manual_seed(5)
    gradient = torch.randn(result.shape, dtype=torch.float64).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, gradient, allow_unused=True)]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the largest element."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def compare(ours: Callable[..., Any], stock: Callable[..., Any], dtype: torch.dtype, *inputs: torch.Tensor) -> None:
    """fp32: equal but for the order of sums. bf16: as near to the exact values as stock, which rounds more often."""
    exact = values_and_gradients(stock, *(tensor.double() for tensor in inputs))
    inputs = tuple(tensor.to(dtype) for tensor in inputs)
    found = values_and_gradients(ours, *inputs)
    expected = values_and_gradients(stock, *inputs)
    for one, other, true in zip(found, expected, exact, strict=True):
        if true is None:
            continue
        assert one.dtype == other.dtype == dtype and one.shape == other.shape
        if dtype == torch.float32:
            assert error(one, true) < 2e-6
        else:
            assert error(one, true) <= 1.1 * error(other, true) + 2**-10


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("rows", [3, 700])  # one chunk, and several
def test_rms_norm(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    stock = LlamaRMSNorm(320, eps=1e-5)

    def stock_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:  # transformers would compute it in fp32
            return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return torch.func.functional_call(stock, {"weight": weight}, (x,))

    # The inputs of all three must be the same numbers.
    x = (torch.randn(1, rows, 320) * 3).bfloat16().float()
    weight = (1 + 0.3 * torch.randn(320)).bfloat16().float()
    compare(lambda x, weight: rms_norm(x, weight, 1e-5), stock_norm, dtype, x, weight)


@DTYPES
def test_rotary_positions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = torch.outer(torch.arange(50.0), 10000 ** -torch.linspace(0, 1, 8)).repeat(1, 2)[None].double()
    x = torch.randn(1, 50, 5, 16).transpose(1, 2)

    def ours(x: torch.Tensor) -> torch.Tensor:
        cos, sin = (values.to(x.dtype).unsqueeze(1) for values in (angles.cos(), angles.sin()))
        return torch.cat(rotate(*x.split((3, 2), dim=1), cos, sin), dim=1)

    def stock(x: torch.Tensor) -> torch.Tensor:
        query, key = x.split((3, 2), dim=1)
        return torch.cat(apply_rotary_pos_emb(query, key, angles.cos().to(x.dtype), angles.sin().to(x.dtype)), dim=1)

    compare(ours, stock, dtype, x.bfloat16().float())


@DTYPES
def test_swiglu_has_stock_values_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(40, 96).to(dtype) for _ in range(2)]
    found = values_and_gradients(swiglu, *inputs)
    expected = values_and_gradients(lambda gate, up: nn.functional.silu(gate) * up, *inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# -- whole models ----------------------------------------------------------------------------------------------------


def llama(dtype: torch.dtype) -> Any:
    """A small one, the same on every call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype=dtype).train()  # type: ignore[call-arg]


def adapted(dtype: torch.dtype, **settings: Any) -> Any:
    """A small Llama with an adapter that is not zero, the same on every call."""
    settings = {"target_modules": "all-linear"} | settings
    lora = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    return get_peft_model(llama(dtype), lora, autocast_adapter_dtype=False).train()


def loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # for dropout
    ids = torch.arange(40).remainder(64)[None]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@DTYPES
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.3},
        {"lora_bias": True},
        {"rank_pattern": {"k_proj": 2, "up_proj": 9}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    ],
    ids=lambda settings: " ".join(settings) or "lora",
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_loss_and_gradients_are_those_of_stock_peft(
    dtype: torch.dtype, settings: dict[str, Any], checkpointing: bool
) -> None:
    compare_models(dtype, lambda: adapted(dtype, **settings), checkpointing, scatters="lora_dropout" in settings)


@DTYPES
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_loss_and_gradients_of_full_training_are_those_of_stock_transformers(
    dtype: torch.dtype, checkpointing: bool
) -> None:
    compare_models(dtype, lambda: llama(dtype), checkpointing)


def compare_models(dtype: torch.dtype, build: Callable[[], Any], checkpointing: bool, scatters: bool = False) -> None:
    """`scatters` says that a double-precision model drops other elements."""
    exact = loss_and_gradients(build().double())
    stock = build()
    ours = build()
    use_training_layers(ours)
    if checkpointing:
        ours.enable_input_require_grads()
        ours.gradient_checkpointing_enable()
    expected = loss_and_gradients(stock)
    found = loss_and_gradients(ours)
    assert found.keys() == expected.keys() and len(found) > 7 * 3
    for name in found:
        if dtype == torch.float32:
            scale = expected[name].abs().max()
            torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=2e-5)
    if dtype == torch.bfloat16 and not scatters:
        # Rounding errors of a whole model scatter: compare their mean over all gradients.
        mean = {
            which: sum(error(values[name], exact[name]) for name in exact) / len(exact)
            for which, values in (("ours", found), ("stock", expected))
        }
        assert mean["ours"] <= 1.1 * mean["stock"], mean


def test_modules_stay_stock_and_adapters_can_be_switched_off() -> None:
    ours = adapted(torch.float32)
    types = {name: type(module) for name, module in ours.named_modules()}
    names = list(ours.state_dict())
    use_training_layers(ours)
    assert {name: type(module) for name, module in ours.named_modules()} == types
    assert list(ours.state_dict()) == names
    stock = adapted(torch.float32)
    ids = torch.arange(9)[None]
    for model in (ours, stock):
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
        with ours.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
        ours.merge_adapter()
        stock.merge_adapter()
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


# -- traffic ---------------------------------------------------------------------------------------------------------


def layer_traffic(stock: bool) -> Traffic:
    """One decoder layer of an 8B with LoRA of rank 16 on all linear layers, bf16, forward and backward."""
    known = models.find("Llama-3.1-8B")
    assert known is not None
    return layer_counts(known.shape, TOKENS, rank=16, stock=stock).traffic


def test_traffic_and_launches_of_an_8b_layer() -> None:
    stock = layer_traffic(stock=True)
    ours = layer_traffic(stock=False)
    assert stock.bytes == pytest.approx(26.1e9, rel=0.01) and stock.launches > 150
    assert (ours.products, ours.attention) == (stock.products, stock.attention)
    assert ours.bytes <= 10e9 and ours.launches <= 70
    # With rates that are the same for both. 12,473 is the public record of other software.
    assert predicted_tokens_per_second(stock, "Llama-3.1-8B", TOKENS) == pytest.approx(10_150, rel=0.02)
    assert predicted_tokens_per_second(ours, "Llama-3.1-8B", TOKENS) >= 13_000
