"""The base model: find its folder, judge that it is whole, fingerprint it, load it. The only user of bitsandbytes."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ft_service import catalog
from ft_service.errors import ModelError
from ft_service.model.attention import PACKED_ATTENTION

# A bar from every worker would bury the run's own progress line.
transformers.utils.logging.disable_progress_bar()

_HUB_FILES = ["*.json", "*.jinja"]
_INDEX_FILE = "model.safetensors.index.json"
_SAMPLE_BYTES = 1024 * 1024


def short_name(base: str) -> str:
    """How the base is named in adapter ids and over HTTP; see `ft_service.catalog.short_name`."""
    return catalog.short_name(base)


def looks_like_folder(base: str) -> bool:
    """Whether `base` is meant as a folder: hub ids have at most one slash, and never start with a dot, ~ or slash."""
    return base.startswith((".", "~", "/")) or base.count("/") > 1 or Path(base).is_dir()


def resolve_base(base: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local folder with the checkpoint, fetched from the hub if `base` is a hub id.

    `weights` False fetches and judges only what planning needs: config and tokenizer. Raises `ModelError` when the
    checkpoint is absent, half-downloaded, or not a Llama in safetensors.
    """
    if looks_like_folder(base):
        folder = Path(base).expanduser().absolute()
        if not folder.is_dir():
            raise ModelError(f"model.base = {base!r}: no such folder. Name a checkpoint folder, or a hub id.")
    else:
        folder = _download(base, revision, weights)
    if weights or looks_like_folder(base):
        check_checkpoint(folder)
    else:
        read_config(folder)
    return folder


def _download(base: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_HUB_FILES, "*.safetensors"] if weights else _HUB_FILES
        return Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, requests' and OS errors: all mean "not fetched"
        raise ModelError(
            f"model.base = {base!r}: cannot be fetched from the hub ({type(error).__name__}: {_first_line(error)}). "
            "Check the id and revision, accept the license on the hub, set HF_TOKEN, or name a local folder."
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json; raises `ModelError` if it is not that of a Llama."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"model.base = {str(folder)!r}: has no config.json. Name the folder of a whole checkpoint.")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file}: is not JSON ({error}). Fetch the checkpoint again.") from None
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if architecture != "LlamaForCausalLM":
        raise ModelError(
            f"model.base = {str(folder)!r}: its architecture is {architecture}. "
            "Use a checkpoint whose config.json says LlamaForCausalLM."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order of name; raises `ModelError` if one is missing."""
    index = folder / _INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        cure = "Convert it to safetensors first." if pickled else "Fetch the checkpoint again."
        raise ModelError(f"model.base = {str(folder)!r}: {', '.join(missing)} missing. {cure}")
    return [folder / name for name in names]


def check_checkpoint(folder: Path) -> None:
    """Raise `ModelError` unless the folder holds a whole Llama checkpoint: config, every weight file at full length."""
    read_config(folder)
    for file in weight_files(folder):
        expected, actual = _declared_size(file), file.stat().st_size
        if expected != actual:
            raise ModelError(
                f"{file}: {actual:,} bytes, and its header speaks of {expected:,}: half-downloaded. Fetch it again."
            )


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        return prefix + stream.read(min(length, file.stat().st_size))


def _declared_size(file: Path) -> int:
    """Bytes the file must have: 8 + header + the end of its last tensor (the safetensors format)."""
    header = _header(file)
    try:
        tensors = json.loads(header[8:])
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{file}: its safetensors header is damaged. Fetch it again.") from None
    return len(header) + max(ends, default=0)


def fingerprint(folder: Path) -> str:
    """SHA-256 that tells this checkpoint from others without reading hundreds of gigabytes.

    Over config.json and, of every weight file, its size, its header (names, types, shapes, places) and its first and
    last MiB of weights.
    """
    digest = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    for file in weight_files(folder):
        header, size = _header(file), file.stat().st_size
        digest.update(f"{file.name} {size} ".encode() + header)
        with file.open("rb") as stream:
            for start in (len(header), max(len(header), size - _SAMPLE_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; raises `ModelError` when it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.base = {str(folder)!r}: has no usable tokenizer ({_first_line(error)}).") from None


def load_base(
    folder: Path,
    *,
    dtype: torch.dtype,
    four_bit: bool = False,
    device: torch.device | None = None,
    partitioned: bool = False,
    attention: str = PACKED_ATTENTION,
) -> LlamaForCausalLM:
    """Load the weights, frozen or not as the caller decides later, in `dtype`, or NF4 with double quantisation.

    `partitioned` says that ZeRO-3 is switched on around this call: it then shards each weight as it comes and chooses
    the place itself. `device` None means the CPU.
    """
    quantization = None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # ZeRO gathers and partitions a floating type without touching its bits; another type it would cast.
            bnb_4bit_quant_storage=dtype,
        )
    model = LlamaForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=quantization,
        device_map=None if device is None or partitioned else {"": device},
        local_files_only=True,
        use_safetensors=True,
    )
    if four_bit:
        _keep_packed_layout(model)
    return model


def _keep_packed_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place for AVX512-BF16 inference.

    It does so at the first `eval()` forward without gradients (a validation) and nothing unpacks them for training.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
