"""A base as the gateway knows it: names, digests, tokenizer and limits, read from its files without its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ft_service.model.base import is_remote, read_config, resolve_base
from ft_service.model.weight_files import WeightFiles
from ft_service.registry.registry import BaseModelRef
from serve.settings import BaseSettings

Precision = Literal["bf16", "fp16", "fp32", "nf4"]
_PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class ServedBase:
    """One base model of a server."""

    ref: BaseModelRef
    folder: Path
    context_length: int
    """Tokens of prompt and answer together."""
    vocab_size: int
    end_ids: frozenset[int]
    """Token ids that end a text, from the base's generation config."""
    precision: Precision
    """How the weights are stored while they are served."""
    parent: str | None = None
    """Name of the base that it was trained from, for the model of a `full` job."""

    @property
    def name(self) -> str:
        return self.ref.short_name


def load_base(settings: BaseSettings, parent: str | None = None, *, weights: bool = True) -> ServedBase:
    """Raises `ModelError` if the base does not exist, is half-downloaded or has no tokenizer.

    With `weights` False, those of a base on object storage are not downloaded, only read in part for the fingerprint.
    """
    folder = resolve_base(settings.base, settings.revision, weights=weights)
    config = read_config(folder)
    files = WeightFiles(settings.base if is_remote(settings.base) and not weights else folder)
    model_context = int(config["max_position_embeddings"])
    ref = BaseModelRef(
        id=settings.base,
        revision=settings.revision,
        short_name=settings.model_name,
        fingerprint=files.fingerprint(),
    )
    return ServedBase(
        ref=ref,
        folder=folder,
        context_length=min(settings.max_context or model_context, model_context),
        vocab_size=int(config["vocab_size"]),
        end_ids=_end_ids(folder, config),
        precision=_precision(settings, config),
        parent=parent,
    )


def _end_ids(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_bytes()) if generation.is_file() else config
    ids = settings.get("eos_token_id")
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _precision(settings: BaseSettings, config: dict[str, Any]) -> Precision:
    if settings.precision == "nf4" or "quantization_config" in config:
        return "nf4"
    dtype = settings.dtype if settings.dtype != "auto" else config.get("dtype") or config.get("torch_dtype")
    return _PRECISIONS.get(str(dtype), "fp32")
