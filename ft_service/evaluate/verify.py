"""Checks of a published adapter: is it complete, does it fit its base, does it change the logits?"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

from ft_service.catalog import models
from ft_service.errors import FtError
from ft_service.model.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from ft_service.model.base import MOVED_BASE, fingerprint, read_config, resolve_base
from ft_service.model.load import load_causal_lm
from ft_service.model.weight_files import WeightFiles
from ft_service.registry.registry import AdapterRecord, Registry

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and details."""

    name: str
    passed: bool
    detail: str


def verify_adapter(registry: Registry, record: AdapterRecord, base: str | None = None) -> list[Check]:
    """Check digests, base, names and shapes, and that the logits differ from the base's. Stops at the first failure.

    `base` is where the base is now (a folder, a hub id or a URI), if not where the record says.

    Needs the base's weights, and memory to load them in bf16.
    """
    folder = registry.folder(record)
    checks = [_digests(registry, record)]
    if not checks[-1].passed:
        return checks
    if record.kind == "model":
        return [*checks, _whole_model(folder)]
    try:
        base_folder = resolve_base(base or record.base.id, None if base else record.base.revision)
    except FtError as error:
        return [*checks, Check("base", False, str(error) if base else f"{error} {MOVED_BASE}")]
    checks.append(_same_base(record, base or record.base.id, base_folder))
    if checks[-1].passed:
        checks.append(_modules(folder, base_folder))
    if checks[-1].passed:
        checks.append(_changes_logits(folder, base_folder))
    return checks


def _digests(registry: Registry, record: AdapterRecord) -> Check:
    damaged = registry.damaged_files(record)
    detail = f"differ: {', '.join(damaged)}" if damaged else f"{len(record.files)} files unchanged"
    return Check("digests", not damaged, detail)


def _whole_model(folder: Path) -> Check:
    try:
        WeightFiles(folder).check()
    except FtError as error:
        return Check("model", False, str(error))
    return Check("model", True, f"complete; fingerprint {fingerprint(folder)[:8]}")


def _same_base(record: AdapterRecord, place: str, base_folder: Path) -> Check:
    actual = fingerprint(base_folder)
    detail = f"{place} has fingerprint {actual[:8]}; the adapter was trained on {record.base.fingerprint[:8]}"
    return Check("base", actual == record.base.fingerprint, detail)


def _modules(folder: Path, base_folder: Path) -> Check:
    """Every LoRA pair must name a linear layer of the base and match its shape. Does not load the base."""
    shape = models.shape_from_config(read_config(base_folder))
    expected = {name: (rows, columns) for name, rows, columns in shape.linear_shapes()}
    wrong = list(_misfits(folder, expected, shape.num_layers))
    adapted = json.loads((folder / CONFIG_FILE).read_text())["target_modules"]
    detail = f"do not fit: {', '.join(wrong[:5])}" if wrong else f"{adapted} fit {shape.num_layers} layers"
    return Check("modules", not wrong, detail)


def _misfits(folder: Path, expected: dict[str, tuple[int, int]], num_layers: int) -> Iterator[str]:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  safe_open is no mapping
            parts = key.split(".")
            if "lora_A" not in parts and "lora_B" not in parts:
                continue
            is_a = "lora_A" in parts
            module = parts[parts.index("lora_A" if is_a else "lora_B") - 1]
            size = tensors.get_slice(key).get_shape()[1 if is_a else 0]
            layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
            if module not in expected or not 0 <= layer < num_layers or size != expected[module][1 if is_a else 0]:
                yield key


@torch.inference_mode()
def _changes_logits(folder: Path, base_folder: Path) -> Check:
    base: LlamaForCausalLM = load_causal_lm(WeightFiles(base_folder), dtype=torch.bfloat16, attention="sdpa")
    ids = torch.arange(1, _PROBE_TOKENS + 1)[None] % base.config.vocab_size
    before = base(input_ids=ids, use_cache=False).logits.float()
    after = load_adapter(base, folder)(input_ids=ids, use_cache=False).logits.float()
    change = float((after - before).abs().max())
    detail = f"largest change over {_PROBE_TOKENS} probe tokens: {change:.3g}"
    return Check("logits", math.isfinite(change) and change > 0, detail)
