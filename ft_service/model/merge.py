"""Fold an adapter into its base, W + (alpha / rank) B A in bf16, as a model folder of its own; weight by weight."""

import shutil
from pathlib import Path

import torch

from ft_service.errors import ModelError, UsageError
from ft_service.model.adapter import TEMPLATE_FILE, merges
from ft_service.model.base import open_checkpoint, resolve_base
from ft_service.model.export import files_beside_weights
from ft_service.model.load import Progress, skeleton, stream_weights
from ft_service.model.weight_files import INDEX_FILE, Checkpoint
from ft_service.model.writer import DTYPE_NAMES, MAX_FILE_BYTES, TensorFormat, WeightWriter, index_of, lay_out
from ft_service.registry.registry import CARD_FILE, AdapterRecord, Registry
from ft_service.runs.progress import LoadingLine
from ft_service.storage.storage import Storage

DTYPE = torch.bfloat16


def merge_adapter(registry: Registry, record: AdapterRecord, out: Path) -> None:
    """Write base and adapter as one bf16 model folder `out`, which must not exist; a failure leaves nothing there.

    Needs memory for the adapter and a few of the base's weights, however large the base is. An adapter trained on a
    4-bit base is merged into the bf16 base, as is usual: answers then differ slightly from those of the 4-bit base it
    saw in training. Raises `UsageError`, `ModelError`, `StorageError`.
    """
    if out.exists():
        raise UsageError(f"OUT = {out}: exists already. Name a new folder.")
    if record.kind != "adapter":
        raise UsageError(f"{record.id}: is a whole model, there is nothing to merge. Use it as model.base directly.")
    if damaged := registry.damaged_files(record):
        raise ModelError(f"{record.id}: damaged on storage ({', '.join(damaged)}). Publish the run again.")
    checkpoint = open_checkpoint(record.base.id, record.base.revision)
    if checkpoint.fingerprint() != record.base.fingerprint:
        raise ModelError(f"{record.base.id}: not the base {record.id} was trained on. Fetch the revision it names.")
    base_folder = resolve_base(record.base.id, record.base.revision, weights=False)
    adapter_folder = registry.folder(record)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        said = LoadingLine(doing="Merging", what="weights")
        write_merged(checkpoint, adapter_folder, base_folder, partial, progress=said)
        shutil.copy2(adapter_folder / CARD_FILE, partial / CARD_FILE)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_merged(
    checkpoint: Checkpoint,
    adapter_folder: Path,
    base_folder: Path,
    folder: Path,
    progress: Progress | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the weights of `checkpoint` with the adapter folded in, and config, tokenizer and template, as `folder`.

    Equal bit for bit to merging the whole model by peft. `base_folder` has config and tokenizer. `progress` is told of
    bytes written.
    """
    base = skeleton(checkpoint, DTYPE, four_bit=False, attention="sdpa")
    merge = merges(skeleton(checkpoint, DTYPE, four_bit=False, attention="sdpa"), adapter_folder)
    shared = {"lm_head.weight", "model.embed_tokens.weight"} & set(merge)
    if shared and base.config.tie_word_embeddings:
        raise ModelError(f"{adapter_folder}: adapts {shared.pop()}, which head and embedding share: not to be merged.")
    shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    # In the order in which they are read; a tied head has no weight of its own.
    formats = {name: TensorFormat(DTYPE_NAMES[DTYPE], shapes[name]) for name in checkpoint.tensors if name in shapes}
    files = lay_out(formats, max_file_bytes=max_file_bytes)
    target = Storage(str(folder))
    total, done = sum(tensor.nbytes for tensor in formats.values()), 0
    with WeightWriter(files, target.writing) as writer:
        for name, weight in stream_weights(checkpoint, base):
            writer.write(name, merge[name](weight) if name in merge else weight)
            del weight  # else it would stay until the next one is read
            done += formats[name].nbytes
            if progress is not None:
                progress(done, total)
    template = (adapter_folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    beside = {INDEX_FILE: index_of(files)} | files_beside_weights(base.config, base_folder, template)
    for name, content in beside.items():
        target.write_bytes(name, content)
