"""One decoder layer of a large Llama on the meta device, forward and backward: bytes moved, launches, bytes saved."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ft_service.catalog.models import ModelShape
from ft_service.model.attention import PACKED_ATTENTION, register_packed_attention
from ft_service.model.training_layers import use_training_layers
from tests.counts import Traffic


@dataclass(frozen=True)
class LayerCounts:
    traffic: Traffic
    saved_bytes: int
    """What autograd keeps for the backward pass, without weights; the layer's input is part of it."""


class _DropoutOfGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        dropped, mask = torch.native_dropout(x, p, True)
        ctx.scale = 1 / (1 - p)
        ctx.save_for_backward(mask)
        result: torch.Tensor = dropped
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, gradients[0], 0.0).mul_(ctx.scale), None


def dropout_as_on_a_gpu(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """A replacement for `F.dropout`, which saves a mask in x's type on a CPU, and makes copies in its backward pass."""
    if not training:
        return x
    dropped: torch.Tensor = _DropoutOfGpu.apply(x, p)
    return dropped


def layer_counts(
    shape: ModelShape, tokens: int, *, rank: int | None, dropout: float = 0.0, stock: bool = False
) -> LayerCounts:
    """bf16, two documents. `rank` and `dropout` are those of LoRA on all linear layers; None trains the layer itself.

    `stock` leaves the layers as transformers and peft compute them.
    """
    register_packed_attention()
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=8,
        num_hidden_layers=1,
    )
    config._attn_implementation = PACKED_ATTENTION
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).bfloat16()
    if rank is not None:
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear")
        get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    if not stock:
        use_training_layers(model)
    (layer,) = model.model.layers
    assert isinstance(layer, LlamaDecoderLayer)
    x = torch.empty(1, tokens, config.hidden_size, device="meta", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.empty(1, tokens, shape.head_dim, device="meta", dtype=torch.bfloat16)
    offsets = torch.empty(3, device="meta", dtype=torch.int32)
    lengths = [tokens // 2, tokens - tokens // 2]
    others = [*layer.parameters(), angles, offsets]
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with Traffic() as traffic, mock.patch("torch.nn.functional.dropout", dropout_as_on_a_gpu):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = layer(x, position_embeddings=(angles, angles), document_lengths=lengths, document_offsets=offsets)
        output.backward(torch.empty_like(output))
    for tensor in others:
        saved.pop(tensor.untyped_storage()._cdata, None)
    return LayerCounts(traffic, sum(storage.nbytes() for storage in saved.values()))
