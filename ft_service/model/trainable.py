"""The model in training: base and adapter built as the plan says, and written as what gets published."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from ft_service.chat.format import ChatFormat
from ft_service.errors import ModelError
from ft_service.model.adapter import attach_adapter, export_adapter
from ft_service.model.base import load_tokenizer
from ft_service.model.export import files_beside_weights
from ft_service.model.load import Progress, WeightPlacement, load_causal_lm
from ft_service.model.weight_files import WeightFiles
from ft_service.plan.plan import RunPlan


class TrainableModel:
    """A base model, and the adapter on it unless the method is `full`.

    `module` is what is trained, `causal_lm` the Llama in it (the same object for a `full` run).
    """

    def __init__(
        self,
        plan: RunPlan,
        base_folder: Path,
        checkpoint: WeightFiles,
        placement: WeightPlacement,
        progress: Progress | None = None,
    ) -> None:
        """Loads the base where `placement` says; every process of a shared placement calls it.

        `base_folder` has config and tokenizer, `checkpoint` the weights.
        """
        spec, method = plan.spec, plan.spec.method
        self._base_folder = base_folder
        self.causal_lm: LlamaForCausalLM = load_causal_lm(
            checkpoint,
            dtype=torch.bfloat16 if spec.train.precision == "bf16" else torch.float32,
            four_bit=method.type == "qlora",
            placement=placement,
            progress=progress,
        )
        self.is_adapter = method.type != "full"
        self.module: LlamaForCausalLM | PeftModel = self.causal_lm
        if self.is_adapter:
            self.module = attach_adapter(self.causal_lm, method, spec.model.base, spec.model.revision)
        self._initial = _trained_parameters(self.module) if method.changes_base else None
        if plan.activation_checkpointing:
            self.causal_lm.gradient_checkpointing_enable()
        self.module.train()

    def export_adapter(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write `weights` (parameter name in `module` -> whole tensor) as an adapter folder."""
        assert isinstance(self.module, PeftModel)
        export_adapter(self.module, weights, self._initial, folder, _chat_template(self._base_folder))

    def files_beside_weights(self) -> dict[str, bytes]:
        """What the folder of a `full` run's model has beside the weights, by file name."""
        return files_beside_weights(self.causal_lm.config, self._base_folder, _chat_template(self._base_folder))


def _trained_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    named = module.named_parameters()
    return {name: parameter.detach().cpu().clone() for name, parameter in named if parameter.requires_grad}


def _chat_template(base_folder: Path) -> str:
    """What is published: Llama 3's template, or '' for a base whose tokenizer has not its special tokens."""
    try:
        return ChatFormat(load_tokenizer(base_folder)).template
    except ModelError:
        return ""
