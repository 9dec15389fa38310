"""`ft adapters`: list, verify, merge, export, promote and delete adapters; their pages."""

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ft_service.cli.common import (
    DEFAULT_STORAGE,
    AsJson,
    StorageRoot,
    Yes,
    confirm_deletion,
    console,
    print_item,
    print_json,
    reject_options_before_subcommand,
)
from ft_service.errors import UsageError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from ft_service.text import counted

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
        reject_options_before_subcommand(context)
        return
    list_adapters(storage, as_json)


@adapters_app.command("list")
def list_adapters(storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """List published adapters, and the models of `full` runs."""
    registry = Registry(Storage(storage))
    registry.refresh()  # so that a folder that was copied or damaged by hand is named
    listings = [registry.listing("model"), registry.listing("adapter")]
    records = [record for listing in listings for record in listing.records]
    for unreadable in (one for listing in listings for one in listing.unreadable):
        print(f"not listed: {unreadable.problem}", file=sys.stderr)
    if as_json:
        print_json([record.model_dump(mode="json") for record in records])
        return
    for record in records:
        validation = "" if record.validation_loss is None else f", validation loss {record.validation_loss:.4f}"
        print_item(
            f"{record.id}  {record.created:%Y-%m-%d %H:%M}",
            f"{record.kind} of {record.base.short_name}",
            f"{counted(record.steps, 'step')}, loss {record.final_loss:.4f}{validation}",
        )


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


@adapters_app.command()
def export(
    adapter_id: str,
    destination: Annotated[str, typer.Argument(help="A new folder; for --to hub, a repository USER/NAME.")],
    to: Annotated[Literal["folder", "hub", "gguf"], typer.Option("--to", help="What to export to.")],
    storage: StorageRoot = DEFAULT_STORAGE,
    base: Base = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge an adapter into its base (always the case for gguf).")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="With --to hub: create a public repository.")] = False,
    gguf_type: Annotated[
        Literal["same", "bf16", "q8_0"], typer.Option(help="With --to gguf: type of the weights; same loses nothing.")
    ] = "same",
    as_json: AsJson = False,
) -> None:
    """Take an adapter or model along: to a folder, to the Hugging Face hub, or as GGUF for llama.cpp; with its card."""
    from ft_service.export.export import export_folder, export_gguf
    from ft_service.export.hub import export_to_hub, naming_advice

    if public and to != "hub":
        raise UsageError(f"--public: only applies to --to hub, not to --to {to}. Leave it out.")
    if gguf_type != "same" and to != "gguf":
        raise UsageError(f"--gguf-type = {gguf_type!r}: only applies to --to gguf, not to --to {to}. Leave it out.")
    if base is not None and not merged and to != "gguf":
        raise UsageError(f"--base = {base!r}: only applies to --merged and --to gguf. Leave it out, or add --merged.")
    registry = Registry(Storage(storage))
    record = registry.resolve(adapter_id)
    result = destination
    advice = ""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # progress is no JSON
        if to == "hub":
            result = export_to_hub(registry, record, destination, merged, public, base)
            advice = naming_advice(record, destination)
        elif to == "gguf":
            result = str(export_gguf(registry, record, Path(destination), gguf_type, base))
        else:
            export_folder(registry, record, Path(destination), merged, base)
    if as_json:
        print_json({"id": record.id, "digest": record.digest, "to": to, "result": result, "advice": advice or None})
        return
    console.print(f"Exported {record.id} to {result}", highlight=False, soft_wrap=True)
    if advice:
        console.print(advice, highlight=False, soft_wrap=True)


@adapters_app.command()
def delete(adapter_id: str, storage: StorageRoot = DEFAULT_STORAGE, yes: Yes = False, as_json: AsJson = False) -> None:
    """Hide an adapter or model at once, then delete its files. Its record stays as a tombstone.

    Asks first, unless --yes is given. If a server may still be answering with it, the files stay for 15 minutes;
    then the server deletes them, or `ft prune --yes`.
    """
    from ft_service.cleanup.removal import delete_adapter
    from ft_service.cli.cleanup import deletion_json, show_deletions

    root = Storage(storage)
    record = Registry(root).resolve(adapter_id)
    run_id = record.run_id
    confirm_deletion(f"{record.kind} {adapter_id}", yes)
    deletion = delete_adapter(root, adapter_id)
    if as_json:
        print_json(deletion_json(deletion))
        return
    console.print(f"Hidden {adapter_id}: it is no longer listed or served.", highlight=False, soft_wrap=True)
    show_deletions([deletion])
    if deletion.kept:
        console.print("Then the server deletes its files, or you do: ft prune --yes", highlight=False)
    if root.exists(f"runs/{run_id}"):
        console.print(f"Its run keeps weights of its own. Delete them with: ft runs delete {run_id}", highlight=False)


@adapters_app.command()
def page(
    adapter_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Several are shown side by side.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it there (default: in STORAGE/scorecards).")
    ] = None,
    storage: StorageRoot = DEFAULT_STORAGE,
) -> None:
    """Write the page of an adapter: score card, changed answers, votes, lineage, promotion, in one HTML file."""
    from ft_service.cli.study_results import stored_studies
    from ft_service.pages.adapter_page import adapter_page, read_adapter, write_adapter_page

    if repeated := next((one for one in adapter_ids if adapter_ids.count(one) > 1), None):
        raise UsageError(f"ID = {repeated!r}: is given twice. Name each adapter once.")
    root = Storage(storage)
    registry = Registry(root)
    adapters = [read_adapter(root, one, stored_studies(root, registry.resolve(one))) for one in adapter_ids]
    if out is None:
        print_item(root.uri(write_adapter_page(root, adapters)))
        return
    try:
        out.write_text(adapter_page(root, adapters), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out = {str(out)!r}: cannot be written ({error.strerror}).") from None
    print_item(str(out))


@adapters_app.command()
def promote(
    adapter_id: str,
    suite: Annotated[
        str | None, typer.Option(help="The suite that decides, if there are evaluations by several.")
    ] = None,
    waive: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK=REASON", help="Promote although this check fails; the reason is recorded."),
    ] = None,
    storage: StorageRoot = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Promote an adapter: BASE-RUN@promoted answers with it from now on, if it passes the thresholds of its suite."""
    from ft_service.evaluate.promotion import parse_waivers
    from ft_service.evaluate.promotion import promote as promote_adapter
    from serve.voting.evidence import votes_about

    root = Storage(storage)
    people = votes_about(root, Registry(root).resolve(adapter_id).digest)
    promotion = promote_adapter(root, adapter_id, suite, parse_waivers(waive or []), people)
    if as_json:
        print_json(promotion.model_dump(mode="json"))
        return
    print_item(f"{promotion.alias} answers with {promotion.adapter_id}")
    for check in promotion.checks:
        state = "ok" if check.passed else f"waived ({check.waived})"
        print_item(f"  {check.name}: {state}", f"  {check.detail}")


@adapters_app.command()
def demote(alias: str, storage: StorageRoot = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """Take an alias (BASE-RUN@promoted) away: it answers nothing from now on. The adapter stays."""
    from ft_service.registry.promotions import Promotions

    promotion = Promotions(Registry(Storage(storage))).demote(alias)
    if as_json:
        print_json(promotion.model_dump(mode="json"))
    else:
        console.print(f"{alias} is gone; {promotion.adapter_id} stays.", highlight=False, soft_wrap=True)
