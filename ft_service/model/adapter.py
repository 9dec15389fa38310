"""Adapters: attach trainable LoRA layers to a frozen base, and export what was trained as stock PEFT folders."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from ft_service.errors import ModelError, TrainingError
from ft_service.spec import MethodSpec

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
