"""The base model: a hub id, a folder or a URI on object storage, and its config, weights and tokenizer."""

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ft_service.catalog import models
from ft_service.errors import ModelError, ModelUnreachableError, StorageError, UnreachableError
from ft_service.model.weight_files import WeightFiles
from ft_service.storage.storage import Storage
from ft_service.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOVED_BASE = "If the base has moved, name its folder with --base PATH."
_HUB_FILES = ["*.json", "*.jinja"]
_REMOTE_CACHE = Path("~/.cache/ft_service/bases")


def short_name(base: str) -> str:
    """The name of the base in adapter ids and over HTTP; see `ft_service.catalog.models.short_name`."""
    return models.short_name(base)


def is_remote(base: str) -> bool:
    """Whether `base` is on object storage (``s3://``, ``gs://``, ``az://``)."""
    return "://" in base


def looks_like_folder(base: str) -> bool:
    """Whether `base` is a folder: hub ids have at most one slash, and never start with a dot, ~ or slash."""
    return not is_remote(base) and (base.startswith((".", "~", "/")) or base.count("/") > 1 or Path(base).is_dir())


def resolve_base(base: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local folder with the model. A hub id or a URI is downloaded first.

    With `weights` False, downloads and checks only config and tokenizer. Raises `ModelError` if the model does not
    exist, is half-downloaded, or is not a Llama in safetensors.
    """
    if looks_like_folder(base):
        folder = Path(base).expanduser().absolute()
        if not folder.is_dir():
            raise ModelError(f"model.base = {base!r}: no such folder. Use a model folder or a hub id.")
    elif is_remote(base):
        folder = _fetch(base, weights)
    else:
        folder = _download(base, revision, weights)
    weight_files = WeightFiles(folder)
    if weights or looks_like_folder(base):
        weight_files.check()
    else:
        _ = weight_files.config
    return folder


def _download(base: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one bar per worker and file would hide the run's own progress line
    try:
        patterns = [*_HUB_FILES, "*.safetensors"] if weights else _HUB_FILES
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except Exception as error:  # errors of the hub client, of its HTTP client, and OS errors
        raise ModelUnreachableError(
            f"model.base = {base!r}: cannot be downloaded from the hub ({type(error).__name__}: {first_line(error)}). "
            "Check the id and revision, accept the license on the hub, set HF_TOKEN, or use a local folder."
        ) from None


def _fetch(uri: str, weights: bool) -> Path:
    """A local copy of a model on object storage. Complete weight files are not downloaded again."""
    folder = _REMOTE_CACHE.expanduser() / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        storage = Storage(uri)
        for file in storage.tree():
            wanted = file.path.endswith((".json", ".jinja")) or (weights and file.path.endswith(".safetensors"))
            target = folder / file.path
            if not wanted or "/" in file.path or _is_cached(target, file.size):
                continue
            partial = target.with_name(f".{target.name}-{os.getpid()}")
            storage.download(file.path, partial)
            partial.replace(target)
    except UnreachableError as error:
        raise ModelUnreachableError(f"model.base = {uri!r}: cannot be downloaded: {error}") from None
    except StorageError as error:
        raise ModelError(f"model.base = {uri!r}: cannot be downloaded: {error}") from None
    return folder


def _is_cached(file: Path, size: int) -> bool:
    # Only weights are cached: JSON files are small, and may be corrected in place.
    return file.suffix == ".safetensors" and file.is_file() and file.stat().st_size == size


def open_weight_files(base: str, revision: str | None = None) -> WeightFiles:
    """The checked weight files of a base. Files on object storage are read by ranges, not downloaded."""
    weight_files = WeightFiles(base if is_remote(base) else resolve_base(base, revision))
    weight_files.check()
    return weight_files


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises `ModelError` if it is not a Llama."""
    return WeightFiles(folder).config


def fingerprint(folder: Path) -> str:
    """See `WeightFiles.fingerprint`."""
    return WeightFiles(folder).fingerprint()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The model's tokenizer. Raises `ModelError` if it has none."""
    # Here, because a replica imports this module before it prepares its imports (`ft_service.model.light_imports`).
    from transformers import PreTrainedTokenizerFast

    try:
        if _has_plain_tokenizer(folder):
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer  # its import takes torch and the code of many models with it

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.base = {str(folder)!r}: has no usable tokenizer ({first_line(error)}).") from None


def _has_plain_tokenizer(folder: Path) -> bool:
    """Whether `AutoTokenizer` would choose `PreTrainedTokenizerFast` for this Llama, as for every Llama 3."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        tokenizer = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    plain = ("PreTrainedTokenizerFast", "TokenizersBackend")
    return (
        config.get("model_type") == "llama"
        and tokenizer.get("tokenizer_class") in plain
        and "auto_map" not in tokenizer
        and (folder / "tokenizer.json").is_file()
    )
