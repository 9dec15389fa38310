"""The base model: a hub id, a folder or a place on object storage, and what is found there."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import transformers
from pyarrow import fs
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ft_service.catalog import models
from ft_service.errors import ModelError, ModelUnreachableError
from ft_service.model.weight_files import Checkpoint
from ft_service.text import first_line

# A bar from every worker would bury the run's own progress line.
transformers.utils.logging.disable_progress_bar()

_HUB_FILES = ["*.json", "*.jinja"]
_REMOTE_CACHE = Path("~/.cache/ft_service/bases")


def short_name(base: str) -> str:
    """How the base is named in adapter ids and over HTTP; see `ft_service.catalog.models.short_name`."""
    return models.short_name(base)


def is_remote(base: str) -> bool:
    """Whether `base` lies on object storage (``s3://``, ``gs://``)."""
    return "://" in base


def looks_like_folder(base: str) -> bool:
    """Whether `base` is meant as a folder: hub ids have at most one slash, and never start with a dot, ~ or slash."""
    return not is_remote(base) and (base.startswith((".", "~", "/")) or base.count("/") > 1 or Path(base).is_dir())


def resolve_base(base: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local folder with the checkpoint, fetched if `base` is a hub id or lies on object storage.

    `weights` False fetches and judges only what planning needs: config and tokenizer. Raises `ModelError` when the
    checkpoint is absent, half-downloaded, or not a Llama in safetensors.
    """
    if looks_like_folder(base):
        folder = Path(base).expanduser().absolute()
        if not folder.is_dir():
            raise ModelError(f"model.base = {base!r}: no such folder. Name a checkpoint folder, or a hub id.")
    elif is_remote(base):
        folder = _fetch(base, weights)
    else:
        folder = _download(base, revision, weights)
    checkpoint = Checkpoint(folder)
    if weights or looks_like_folder(base):
        checkpoint.check()
    else:
        _ = checkpoint.config
    return folder


def _download(base: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_HUB_FILES, "*.safetensors"] if weights else _HUB_FILES
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and OS errors: all mean "not fetched"
        raise ModelUnreachableError(
            f"model.base = {base!r}: cannot be fetched from the hub ({type(error).__name__}: {first_line(error)}). "
            "Check the id and revision, accept the license on the hub, set HF_TOKEN, or name a local folder."
        ) from None


def _fetch(uri: str, weights: bool) -> Path:
    """A copy of a checkpoint on object storage; files that are there in their full length are not fetched again."""
    folder = _REMOTE_CACHE.expanduser() / hashlib.sha256(uri.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        store, base = fs.FileSystem.from_uri(uri)
        found = store.get_file_info(fs.FileSelector(base))
        for info in found:
            wanted = info.base_name.endswith((".json", ".jinja")) or (weights and info.extension == "safetensors")
            target = folder / info.base_name
            if not wanted or _is_cached(target, info):
                continue
            partial = target.with_name(f".{target.name}-{os.getpid()}")
            fs.copy_files(info.path, str(partial), source_filesystem=store, destination_filesystem=fs.LocalFileSystem())
            partial.replace(target)
    except (OSError, pyarrow.ArrowException) as error:
        raise ModelUnreachableError(
            f"model.base = {uri!r}: cannot be fetched ({error}). Check the URI and your credentials for it."
        ) from None
    return folder


def _is_cached(file: Path, there: fs.FileInfo) -> bool:
    # Settings are small and may be mended in place; weights are neither.
    return file.suffix == ".safetensors" and file.is_file() and file.stat().st_size == there.size


def open_checkpoint(base: str, revision: str | None = None) -> Checkpoint:
    """The weights of a base, whole and where they are: on object storage they are read by ranges, not fetched."""
    checkpoint = Checkpoint(base if is_remote(base) else resolve_base(base, revision))
    checkpoint.check()
    return checkpoint


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json; raises `ModelError` if it is not that of a Llama."""
    return Checkpoint(folder).config


def fingerprint(folder: Path) -> str:
    """See `Checkpoint.fingerprint`."""
    return Checkpoint(folder).fingerprint()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; raises `ModelError` when it has none."""
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
