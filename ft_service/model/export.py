"""What a model folder has beside its weights, so that stock transformers loads it and the next run can build on it."""

import tempfile
from pathlib import Path

from transformers import PretrainedConfig

from ft_service.model.weight_files import CONFIG_FILE

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json")


def files_beside_weights(config: PretrainedConfig, base_folder: Path, chat_template: str) -> dict[str, bytes]:
    """Config, tokenizer and chat template, by file name; `base_folder` is where the tokenizer is taken from."""
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        files = {CONFIG_FILE: Path(temporary, CONFIG_FILE).read_bytes()}
    for pattern in _TOKENIZER_FILES:
        files |= {file.name: file.read_bytes() for file in sorted(base_folder.glob(pattern))}
    return files | {"chat_template.jinja": chat_template.encode()}
