"""The model that is trained: base and adapter as the plan describes them, and its export for publishing."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from ft_service.chat.format import ChatFormat
from ft_service.errors import ModelError
from ft_service.model.adapter import attach_adapter, export_adapter
from ft_service.model.base import load_tokenizer
from ft_service.model.linear import make_linears_memory_efficient
from ft_service.model.load import Progress, WeightPlacement, load_causal_lm
from ft_service.model.weight_files import WeightFiles
from ft_service.model.writer import config_and_tokenizer_files
from ft_service.plan.plan import RunPlan


class TrainableModel:
    """A base model, with an adapter unless the method is `full`.

    `module` is the model to train, `causal_lm` the Llama inside it (the same object if the method is `full`).
    """

    def __init__(
        self,
        plan: RunPlan,
        base_folder: Path,
        weight_files: WeightFiles,
        placement: WeightPlacement,
        progress: Progress | None = None,
    ) -> None:
        """Load the base. If `placement` partitions weights, every rank must call this.

        `base_folder` has the base's config and tokenizer, `weight_files` its weights.
        """
        spec = plan.spec
        method = spec.method
        self._base_folder = base_folder
        self.causal_lm: LlamaForCausalLM = load_causal_lm(
            weight_files,
            dtype=torch.bfloat16 if spec.train.precision == "bf16" else torch.float32,
            four_bit=method.type == "qlora",
            placement=placement,
            progress=progress,
        )
        self.is_adapter = method.type != "full"
        self.module: LlamaForCausalLM | PeftModel = self.causal_lm
        if self.is_adapter:
            self.module = attach_adapter(self.causal_lm, method, spec.model.base, spec.model.revision)
            if plan.zero_stage == 3:
                # ZeRO-3 reduces a layer's gradients when the gradient of the layer's input is ready. Without one, as in
                # the first layer of a frozen base, it would reduce them before they are computed.
                self.causal_lm.enable_input_require_grads()
        if plan.zero_stage == 3:  # the other stages free no weights
            make_linears_memory_efficient(self.module)
        self._initial = _trained_parameters(self.module) if method.changes_base else None
        if plan.activation_checkpointing:
            self.causal_lm.gradient_checkpointing_enable()
            layers = self.causal_lm.model.layers
            for layer in layers[len(layers) - plan.kept_layers :]:
                layer.gradient_checkpointing = False
        self.module.train()

    def export_adapter(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write `weights` (parameter name in `module` -> whole tensor) as an adapter folder."""
        assert isinstance(self.module, PeftModel)
        export_adapter(self.module, weights, self._initial, folder, _chat_template(self._base_folder))

    def config_and_tokenizer_files(self) -> dict[str, bytes]:
        """File name -> content of what the model folder of a `full` run has next to its weights."""
        return config_and_tokenizer_files(self.causal_lm.config, self._base_folder, _chat_template(self._base_folder))


def _trained_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    named = module.named_parameters()
    return {name: parameter.detach().cpu().clone() for name, parameter in named if parameter.requires_grad}


def _chat_template(base_folder: Path) -> str:
    """Llama 3's chat template; '' if the base's tokenizer lacks Llama 3's special tokens."""
    try:
        return ChatFormat(load_tokenizer(base_folder)).template
    except ModelError:
        return ""
