"""Linear layers in oneDNN's layout compute what the plain ones do."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from serve.engines.batching.lora_layers import install_lora_layers
from serve.engines.batching.packed_linear import PackedLinear, _Product, pack_linear_layers


@pytest.mark.parametrize("rows", [1, 3, 16, 130])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_layer_computes_what_the_plain_one_does(
    rows: int, dtype: torch.dtype, tolerance: float, has_bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=has_bias).to(dtype)
    x_1NI = torch.randn(1, rows, 96, dtype=dtype)
    packed = PackedLinear(linear)
    expected = nn.functional.linear(x_1NI.double(), linear.weight.double(), None)
    if has_bias:
        expected = expected + linear.bias.double()
    assert packed(x_1NI).dtype == dtype
    torch.testing.assert_close(packed(x_1NI).double(), expected, rtol=tolerance, atol=tolerance)


def test_the_plain_weight_comes_back_bit_for_bit() -> None:
    linear = nn.Linear(96, 40)
    assert torch.equal(PackedLinear(linear).dense_weight(), linear.weight)


@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_that_share_their_input_are_one_product(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(96, outputs, bias=has_bias) for outputs in (40, 16, 24)]
    packed = PackedLinear.together(linears)
    computed: list[torch.Tensor] = []
    compute = _Product.compute

    def recorded(product: _Product, x: torch.Tensor) -> torch.Tensor:
        computed.append(x)
        return compute(product, x)

    monkeypatch.setattr(_Product, "compute", recorded)
    for x_1NI in torch.randn(2, 1, 3, 96):
        for layer, linear in zip(packed, linears, strict=True):
            torch.testing.assert_close(layer(x_1NI), linear(x_1NI), rtol=1e-5, atol=1e-5)
            assert torch.equal(layer.dense_weight(), linear.weight)
    assert len(computed) == 2


def test_what_a_caller_adds_to_shared_outputs_is_not_in_the_next_ones() -> None:
    """Adapters add to a layer's outputs in place."""
    linears = [nn.Linear(96, 40), nn.Linear(96, 16)]
    first, second = PackedLinear.together(linears)
    x_1NI = torch.randn(1, 3, 96)
    first(x_1NI).add_(1)
    torch.testing.assert_close(first(x_1NI), linears[0](x_1NI), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second(x_1NI), linears[1](x_1NI), rtol=1e-5, atol=1e-5)


def test_every_linear_layer_of_a_model_on_a_cpu_is_packed_and_no_plain_weight_is_kept() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=80
    )
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    plain = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    pack_linear_layers(model)
    packed = [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]
    assert packed == plain
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())
    # Of parameters, the embedding and the norms are left.
    assert {name.split(".")[-2] for name, _ in model.named_parameters()} == {
        "embed_tokens",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    lora = install_lora_layers(model)
    assert lora.sites["model.layers.0.mlp.up_proj"].shape == (64, 32)
    assert lora.sites["lm_head"].weight().shape == (80, 32)


def test_other_layers_are_left_alone() -> None:
    class Special(nn.Linear):
        """As bitsandbytes' layers are."""

    model = nn.Sequential(Special(8, 8), nn.Linear(8, 8).double())
    pack_linear_layers(model)
    assert not any(isinstance(layer, PackedLinear) for layer in model)
