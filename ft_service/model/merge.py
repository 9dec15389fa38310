"""Merge an adapter into its base, W + (alpha / rank) B A in bf16, weight by weight, into a new model folder."""

import shutil
from pathlib import Path

import torch

from ft_service.catalog import models
from ft_service.errors import ModelError, UsageError
from ft_service.model.adapter import TEMPLATE_FILE, merge_functions
from ft_service.model.base import MOVED_BASE, open_weight_files, resolve_base
from ft_service.model.load import Progress, meta_model, stream_weights
from ft_service.model.weight_files import INDEX_FILE, WeightFiles
from ft_service.model.writer import (
    DTYPE_NAMES,
    MAX_FILE_BYTES,
    TensorFormat,
    WeightWriter,
    config_and_tokenizer_files,
    index_of,
    lay_out,
)
from ft_service.registry.card import merged_card
from ft_service.registry.registry import CARD_FILE, AdapterRecord, Registry
from ft_service.runs.progress import LoadingLine
from ft_service.storage.storage import Storage

DTYPE = torch.bfloat16


def merge_adapter(registry: Registry, record: AdapterRecord, out: Path, base: str | None = None) -> None:
    """Write base and adapter as one bf16 model folder `out`. `out` must not exist; on an error it is not created.

    `base` is where the base is now (a folder, a hub id or a URI), if not where the record says.

    Needs memory for the adapter and a few of the base's weights, independent of the size of the base. An adapter
    trained on a 4-bit base is merged into the bf16 base, as is usual: answers then differ slightly from those on the
    4-bit base. Raises `UsageError`, `ModelError`, `StorageError`.
    """
    if out.exists():
        raise UsageError(f"OUT = {out}: exists already. Choose a new folder.")
    if record.kind != "adapter":
        raise UsageError(f"{record.id}: is a full model, there is nothing to merge. Use it as model.base directly.")
    if damaged := registry.damaged_files(record):
        raise ModelError(f"{record.id}: damaged on storage ({', '.join(damaged)}). Publish its run again.")
    place = base or record.base.id
    revision = None if base else record.base.revision
    try:
        weight_files = open_weight_files(place, revision)
    except ModelError as error:
        raise type(error)(str(error) if base else f"{error} {MOVED_BASE}") from None
    if weight_files.fingerprint() != record.base.fingerprint:
        raise ModelError(
            f"{place}: is not the base that {record.id} was trained on (fingerprint {weight_files.fingerprint()[:8]} "
            f"instead of {record.base.fingerprint[:8]}). Name the right one with --base PATH."
        )
    base_folder = resolve_base(place, revision, weights=False)
    adapter_folder = registry.folder(record)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        progress = LoadingLine(doing="Merging", what="weights")
        write_merged(weight_files, adapter_folder, base_folder, partial, progress)
        card = merged_card(record.model_dump(mode="json"), models.find(record.base.id), out.name)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_merged(
    weight_files: WeightFiles,
    adapter_folder: Path,
    base_folder: Path,
    folder: Path,
    progress: Progress | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `folder`: the weights with the adapter merged in, config, tokenizer and chat template.

    Bit for bit the same as peft merging the whole model. `base_folder` has the base's config and tokenizer. `progress`
    gets the bytes written so far, and in total.
    """
    base = meta_model(weight_files, DTYPE, four_bit=False, attention="sdpa")
    merge = merge_functions(meta_model(weight_files, DTYPE, four_bit=False, attention="sdpa"), adapter_folder)
    shared = {"lm_head.weight", "model.embed_tokens.weight"} & set(merge)
    if shared and base.config.tie_word_embeddings:
        raise ModelError(
            f"{adapter_folder}: changes {shared.pop()}, which head and embedding share, so it cannot be merged."
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    # In the order in which they are read. A tied head has no weight of its own.
    formats = {name: TensorFormat(DTYPE_NAMES[DTYPE], shapes[name]) for name in weight_files.tensors if name in shapes}
    files = lay_out(formats, max_file_bytes=max_file_bytes)
    target = Storage(str(folder))
    total = sum(tensor.nbytes for tensor in formats.values())
    done = 0
    with WeightWriter(files, target.writing) as writer:
        for name, weight in stream_weights(weight_files, base):
            writer.write(name, merge[name](weight) if name in merge else weight)
            del weight  # free it before the next one is read
            done += formats[name].nbytes
            if progress is not None:
                progress(done, total)
    template = (adapter_folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    others = {INDEX_FILE: index_of(files)} | config_and_tokenizer_files(base.config, base_folder, template)
    for name, content in others.items():
        target.write_bytes(name, content)
