"""`ft migrate`: creates jobs of another service again, on a server of this project."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_service.cli.common import AsJson, console, print_item, print_json
from ft_service.cli.serve import DEFAULT_URL
from ft_service.text import counted

if TYPE_CHECKING:
    from ft_service.migrate.migration import MigrationJob

migrate_app = typer.Typer(help="Carry fine-tuning jobs of another service over.", no_args_is_help=True)


@migrate_app.callback()
def options() -> None:
    """Carry fine-tuning jobs of another service over."""


@migrate_app.command("openai")
def openai(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS", help="JSON or JSON lines of client.fine_tuning.jobs.list().")],
    files: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Training and validation files, named <file id>.jsonl.")
    ] = None,
    model_map: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="MODEL=SERVED", help="OpenAI's model and the served one that takes its place."),
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Models, hyperparameters and files, in YAML.")
    ] = None,
    job: Annotated[
        list[str] | None, typer.Option("--job", help="Only this job, whatever its status. Can be repeated.")
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out rows that cannot be trained on.")
    ] = False,
    server: Annotated[str, typer.Option(metavar="URL", envvar="FT_SERVER", help="The server's address.")] = DEFAULT_URL,
    key: Annotated[str | None, typer.Option(envvar="FT_API_KEY", help="Key of that server.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; ask no server.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create the fine-tuning jobs of an OpenAI account again, on a server of this project.

    Reports everything that cannot be carried over, and why. Run again, it creates only what is missing. Exit code 1:
    some jobs cannot be carried over.
    """
    from ft_service.migrate.create import FineTuningServer, create_jobs
    from ft_service.migrate.exported import read_jobs
    from ft_service.migrate.mapping import read_mapping
    from ft_service.migrate.migration import plan_migration

    planned = plan_migration(
        read_jobs(jobs), read_mapping(mapping, model_map or []), files, skip_bad_lines, tuple(job or ())
    )
    if not dry_run:
        connection = FineTuningServer(server, key)
        try:
            create_jobs(connection, planned)
        finally:
            connection.close()
    if as_json:
        print_json(_as_json(planned))
    else:
        _show(planned, dry_run)
    if any(one.outcome in ("refused", "failed") for one in planned):
        raise SystemExit(1)


def _as_json(planned: "list[MigrationJob]") -> dict[str, object]:
    from ft_service.migrate.migration import NEVER_CARRIED_OVER

    return {"jobs": [one.as_json() for one in planned], "never_carried_over": list(NEVER_CARRIED_OVER)}


def _show(planned: "list[MigrationJob]", dry_run: bool) -> None:
    from ft_service.migrate.migration import NEVER_CARRIED_OVER

    for one in planned:
        head = f"{one.source.id}  {one.source.model} -> {one.model or '?'}  {one.outcome}"
        rows = [
            f"{name}: {counted(report.rows, 'row')}, {report.with_tools:,} with tools, {report.with_weights:,} with "
            "weights"
            for name, report in one.rows.items()
        ]
        made = [f"job {one.job_id}"] if one.job_id else []
        details = [
            *made,
            *rows,
            *(f"Problem: {text}" for text in one.problems),
            *(f"Note: {text}" for text in one.notes),
        ]
        print_item(head, *(line for text in details for line in text.split("\n")))
    for text in NEVER_CARRIED_OVER if planned else ():
        print_item(f"Not carried over: {text}")
    counts = ", ".join(
        f"{sum(one.outcome == outcome for one in planned)} {outcome}"
        for outcome in ("ready", "created", "exists", "skipped", "refused", "failed")
        if any(one.outcome == outcome for one in planned)
    )
    console.print(f"{counted(len(planned), 'job')}: {counts or 'nothing to do'}.", highlight=False)
    if dry_run:
        console.print("This was a dry run: no server was asked.", style="dim")
