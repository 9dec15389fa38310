"""Exports an adapter or model to a new folder: as published, merged into its base, or as a GGUF file with its card."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ft_service.errors import ModelError, UsageError
from ft_service.export.gguf_file import GgufType, write_gguf
from ft_service.registry.registry import CARD_FILE, RECORD_FILE, AdapterRecord, Registry


def export_folder(
    registry: Registry, record: AdapterRecord, out: Path, merged: bool = False, base: str | None = None
) -> None:
    """Copy a published adapter or model to the new folder `out`, or write it merged into its base.

    `base` is where the base is now, if not where the record says. A copy keeps the record, so `out` can be checked
    against it. A full model is whole, so `merged` changes nothing.
    On an error `out` is not created. Raises `UsageError` if it exists, `ModelError` if published files are damaged.
    """
    if merged and record.kind == "adapter":
        from ft_service.model.merge import merge_adapter  # imports torch

        merge_adapter(registry, record, out, base)
        return
    with _new_folder(out) as partial:
        _copy_published(registry, record, partial)


def export_gguf(
    registry: Registry, record: AdapterRecord, out: Path, gguf_type: GgufType = "same", base: str | None = None
) -> Path:
    """Write a published model, or an adapter merged into its base, as a GGUF file in the new folder `out`.

    `base` is as for `export_folder`. Returns the file; the model card is next to it. Merging needs disk for the whole
    model, until the file is complete.
    On an error `out` is not created. Raises `UsageError` if it exists, `ModelError` if GGUF cannot describe the model.
    """
    with _new_folder(out) as partial, tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        source = Path(work, record.id)
        if record.kind == "adapter":
            export_folder(registry, record, source, merged=True, base=base)
        else:
            _raise_if_damaged(registry, record)
            source = registry.folder(record)
        name = f"{record.id}.gguf"
        write_gguf(source, partial / name, record.id, gguf_type)
        shutil.copyfile(source / CARD_FILE, partial / CARD_FILE)
    return out / name


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end of the block, and is deleted if the block fails."""
    if out.exists():
        raise UsageError(f"DESTINATION = {out}: exists already. Choose a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())  # mkdtemp lets only its owner in
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _copy_published(registry: Registry, record: AdapterRecord, folder: Path) -> None:
    _raise_if_damaged(registry, record)
    source = registry.folder(record)
    for name in (*record.files, RECORD_FILE):
        shutil.copyfile(source / name, folder / name)


def _raise_if_damaged(registry: Registry, record: AdapterRecord) -> None:
    if damaged := registry.damaged_files(record):
        raise ModelError(f"{record.id}: damaged on storage ({', '.join(damaged)}). Publish its run again.")
