"""A `full` run's weights as a model folder that stock transformers loads and the next run can take as its base."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import LlamaForCausalLM

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json")


def export_model(
    model: LlamaForCausalLM, trained: Mapping[str, torch.Tensor], base_folder: Path, folder: Path, chat_template: str
) -> None:
    """Write config, weights (safetensors, 5 GB a file), tokenizer and chat template; `trained` holds whole tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in trained.items()}, folder, safe_serialization=True
    )
    for pattern in _TOKENIZER_FILES:
        for file in base_folder.glob(pattern):
            shutil.copy2(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
