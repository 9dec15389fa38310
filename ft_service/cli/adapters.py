"""`ft adapters`: list, verify and merge what runs have published."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ft_service.cli.common import DEFAULT_STORAGE, AsJson, StorageRoot, console, new_table, print_json
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage

Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="PATH",
        help="Where the base is now, if it has moved; its fingerprint is checked.",
    ),
]

adapters_app = typer.Typer(help="Published adapters and models.", invoke_without_command=True)


@adapters_app.callback()
def adapters(context: typer.Context, storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List published adapters, and the models of `full` runs."""
    if context.invoked_subcommand is not None:
        return
    registry = Registry(Storage(storage))
    records = [*registry.records("model"), *registry.records("adapter")]
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
        return
    table = new_table("id", "kind", "base", "steps", "loss", "validation loss", "created")
    for record in records:
        table.add_row(
            record.id,
            record.kind,
            record.base.short_name,
            str(record.steps),
            f"{record.final_loss:.4f}",
            "" if record.validation_loss is None else f"{record.validation_loss:.4f}",
            f"{record.created:%Y-%m-%d %H:%M}",
        )
    console.print(table)


@adapters_app.command()
def verify(adapter_id: str, storage: StorageRoot = DEFAULT_STORAGE, base: Base = None, as_json: AsJson = False) -> None:
    """Verify one adapter: its digests, its fit to the base, and that its logits differ from the base's."""
    from ft_service.evaluate.verify import verify_adapter

    registry = Registry(Storage(storage))
    checks = verify_adapter(registry, registry.resolve(adapter_id), base)
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        for check in checks:
            mark = "[green]ok[/green]    " if check.passed else "[red]failed[/red]"
            console.print(f"{mark} {check.name}: {check.detail}", highlight=False)
    if not all(check.passed for check in checks):
        raise SystemExit(1)


@adapters_app.command()
def merge(adapter_id: str, out: Path, storage: StorageRoot = DEFAULT_STORAGE, base: Base = None) -> None:
    """Merge an adapter into its base in bf16, and write the model to the new folder OUT."""
    from ft_service.model.merge import merge_adapter

    registry = Registry(Storage(storage))
    record = registry.resolve(adapter_id)
    merge_adapter(registry, record, out, base)
    console.print(f"Merged {record.id} into {out}")
