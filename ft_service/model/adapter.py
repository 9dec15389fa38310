"""Adapters: attach trainable LoRA layers to a frozen base, and export what was trained as stock PEFT folders."""

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

    Each chosen W gets W + (alpha / rank) B A, A [rank, in], B [out, rank] (Hu et al. 2021, arXiv:2106.09685); rsLoRA,
    DoRA, PiSSA and the like are peft's own. Raises `ModelError` when `target_modules` matches nothing.
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
        # Without the cast to fp32 that peft does by itself, all ZeRO stages train the same bf16 parameters (with fp32
        # masters); with it, stages 1-2 would cast them back and stage 3 would not.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ModelError(f"method = {method.model_dump()}: peft refuses it ({error}).") from None
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

    `trained` maps parameter names of `model` to whole tensors. `initial` holds their values before the first step, for
    initialisations that change the base (PiSSA, OLoRA): the adapter written then has twice the rank and is relative to
    the *unchanged* base, since W + BA - B0 A0 = W + [B, -B0] [A; A0]. Raises `TrainingError` on an empty adapter, the
    classic failure under ZeRO-3.
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
    """`base` with the adapter of a published folder on it, for inference. Changes `base` itself."""
    return PeftModel.from_pretrained(base, folder).eval()


Merge = Callable[[torch.Tensor], torch.Tensor]


def merges(skeleton: LlamaForCausalLM, folder: Path) -> dict[str, Merge]:
    """How the adapter of a published folder changes each weight of its base, by name of the weight in the base.

    `skeleton` is the base on the meta device, in the type of the weights; it is changed. A merge takes a weight [out,
    in] and gives another one; its arithmetic is peft's own `merge(safe_merge=True)`. Raises `ModelError` when the
    adapter is not one for this base.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # peft warns of a base that lies elsewhere now
    try:
        adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ModelError(f"{folder}: does not fit the base ({error}).") from None
    layers = {name: module for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    for layer in layers.values():
        for attribute in layer.adapter_layer_names:
            # The adapter's own weights are small and become real, in the type that peft gives them for inference.
            getattr(layer, attribute).to_empty(device="cpu")
    loaded: Any = set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS_FILE), adapter_name=ADAPTER_NAME)
    missing = [name for name in loaded.missing_keys if f".{ADAPTER_NAME}." in name]
    if missing or loaded.unexpected_keys:
        wrong = ", ".join([*missing, *loaded.unexpected_keys][:3])
        raise ModelError(f"{folder}: its weights are not those that its {CONFIG_FILE} describes ({wrong}).")
    prefix = "base_model.model."
    return {f"{name.removeprefix(prefix)}.weight": _merge_of(layer, folder) for name, layer in layers.items()}


def _merge_of(layer: LoraLayer, folder: Path) -> Merge:
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
        layer._caches.clear()  # DoRA keeps norms there, to undo the merge
        return merged

    return merge
