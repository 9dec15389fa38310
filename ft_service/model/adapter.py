"""Adapters: attach LoRA layers to a frozen base, export them as stock PEFT folders, load and merge them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from ft_service.errors import ModelError, TrainingError
from ft_service.spec.schema import MethodSpec

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
TEMPLATE_FILE = "chat_template.jinja"
ADAPTER_NAME = "default"


def attach_adapter(model: LlamaForCausalLM, method: MethodSpec, base: str, revision: str | None) -> PeftModel:
    """Freeze the base and add LoRA layers in the base's own dtype.

    Each target W becomes W + (alpha / rank) B A, with A [rank, in] and B [out, rank] (Hu et al. 2021,
    arXiv:2106.09685). rsLoRA, DoRA, PiSSA and others are peft's implementations. Raises `ModelError` if
    `target_modules` matches no layer.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.lora_rank,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=method.target_modules,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        init_lora_weights=method.init_lora_weights,  # type: ignore[arg-type]
        base_model_name_or_path=base,
        revision=revision,
    )
    try:
        # By default peft casts the adapter to fp32. ZeRO-1 and 2 would cast it back to bf16, ZeRO-3 would not. Without
        # the cast all stages train the same bf16 parameters, with fp32 master weights.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"method = {method.model_dump()}: peft rejects it ({error}).") from None
    dtype = model.dtype
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    assert isinstance(adapted, PeftModel)
    return adapted


def export_adapter(
    model: PeftModel,
    trained: Mapping[str, torch.Tensor],
    initial: Mapping[str, torch.Tensor] | None,
    folder: Path,
    chat_template: str,
) -> None:
    """Write a stock PEFT adapter folder from gathered weights.

    `trained` maps parameter names of `model` to whole tensors. `initial` has their values before the first step; it is
    needed for initialisations that change the base (PiSSA, OLoRA). The exported adapter then has twice the rank and
    applies to the *unchanged* base, since W + BA - B0 A0 = W + [B, -B0] [A; A0]. Raises `TrainingError` if the adapter
    is empty, the usual result of exporting without gathering under ZeRO-3.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, state_dict=dict(trained), adapter_name=ADAPTER_NAME)
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    if empty or not weights:
        raise TrainingError(f"the adapter to publish is empty ({', '.join(empty[:3]) or 'no weights at all'}).")
    config = LoraConfig(**{**model.peft_config[ADAPTER_NAME].to_dict(), "inference_mode": True})
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules or [])  # a set: its order would change the digest
    if initial is not None:
        before = get_peft_model_state_dict(model, state_dict=dict(initial), adapter_name=ADAPTER_NAME)
        weights = {name: _relative_to_base(name, tensor, before[name]) for name, tensor in weights.items()}
        # [A; A0] has rank 2r, so alpha must keep alpha / r (or alpha / sqrt(r)) as it was.
        config.r *= 2
        config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # type: ignore[assignment]
        config.init_lora_weights = True
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in weights.items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))
    (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def _relative_to_base(name: str, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    if "lora_A" in name:
        return torch.cat([after, before], dim=0)
    if "lora_B" in name:
        return torch.cat([after, -before], dim=1)
    return after


def load_adapter(base: LlamaForCausalLM, folder: Path) -> PeftModel:
    """Attach the adapter of a published folder to `base`, for inference. Changes `base` in place."""
    return PeftModel.from_pretrained(base, folder).eval()


MergeFunction = Callable[[torch.Tensor], torch.Tensor]
"""Takes a weight [out, in] of the base and returns it with the adapter merged in."""


def merge_functions(model: LlamaForCausalLM, folder: Path) -> dict[str, MergeFunction]:
    """Name of each adapted weight of the base -> the function that merges a published folder's adapter into it.

    `model` is the base on the meta device, in the dtype of the weights; it is changed in place. The arithmetic is
    peft's own `merge(safe_merge=True)`. Raises `ModelError` if the adapter does not fit the base.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # otherwise peft warns that the base has moved
    try:
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ModelError(f"{folder}: does not fit the base ({error}).") from None
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        for attribute in layer.adapter_layer_names:
            # Only the adapter's own small weights get memory, in the dtype that peft uses for inference.
            getattr(layer, attribute).to_empty(device="cpu")
    loaded: Any = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS_FILE), adapter_name=ADAPTER_NAME)
    missing = [name for name in loaded.missing_keys if f".{ADAPTER_NAME}." in name]
    if missing or loaded.unexpected_keys:
        wrong = ", ".join([*missing, *loaded.unexpected_keys][:3])
        raise ModelError(f"{folder}: its weights are not those that its {CONFIG_FILE} describes ({wrong}).")
    prefix = "base_model.model."
    return {f"{name.removeprefix(prefix)}.weight": _merge_function(layer, folder) for name, layer in layers.items()}


def _merge_function(layer: LoraLayer, folder: Path) -> MergeFunction:
    @torch.no_grad()
    def merge(weight: torch.Tensor) -> torch.Tensor:
        linear = layer.get_base_layer()
        empty = linear.weight
        linear.weight = nn.Parameter(weight, requires_grad=False)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"{folder}: cannot be merged ({error}).") from None
        merged: torch.Tensor = linear.weight.data
        linear.weight = empty
        layer._caches.clear()  # DoRA caches norms there for unmerging
        return merged

    return merge
