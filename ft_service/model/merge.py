"""Fold an adapter into its base: W + (alpha / rank) B A, in bf16, as a model folder of its own."""

import shutil
from pathlib import Path

import torch

from ft_service.errors import ModelError, UsageError
from ft_service.model.adapter import load_adapter
from ft_service.model.base import fingerprint, resolve_base
from ft_service.model.checkpoint import Checkpoint
from ft_service.model.export import export_model
from ft_service.model.load import load_causal_lm
from ft_service.registry import CARD_FILE, AdapterRecord, Registry


def merge_adapter(registry: Registry, record: AdapterRecord, out: Path) -> None:
    """Write base and adapter as one bf16 model folder `out`, which must not exist; a failure leaves nothing there.

    An adapter trained on a 4-bit base is merged into the bf16 base, as is usual: answers then differ slightly from
    those of the 4-bit base it saw in training. Raises `UsageError`, `ModelError`.
    """
    if out.exists():
        raise UsageError(f"OUT = {out}: exists already. Name a new folder.")
    if record.kind != "adapter":
        raise UsageError(f"{record.id}: is a whole model, there is nothing to merge. Use it as model.base directly.")
    if damaged := registry.damaged_files(record):
        raise ModelError(f"{record.id}: damaged on storage ({', '.join(damaged)}). Publish the run again.")
    base_folder = resolve_base(record.base.id, record.base.revision)
    if fingerprint(base_folder) != record.base.fingerprint:
        raise ModelError(f"{record.base.id}: not the base {record.id} was trained on. Fetch the revision it names.")
    folder = registry.folder(record)
    base = load_causal_lm(Checkpoint(base_folder), dtype=torch.bfloat16, attention="sdpa")
    merged = load_adapter(base, folder).merge_and_unload(safe_merge=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        weights = {name: parameter.detach() for name, parameter in merged.named_parameters()}
        export_model(merged, weights, base_folder, partial, template)
        shutil.copy2(folder / CARD_FILE, partial / CARD_FILE)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
