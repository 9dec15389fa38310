"""`ft migrate`: creates jobs of another service again, on a server of this project."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ft_service.cli.common import AsJson, console, print_item, print_json
from ft_service.cli.serve import DEFAULT_URL
from ft_service.text import counted

if TYPE_CHECKING:
    from ft_service.migrate.migration import MigrationJob

_COMPARISON_FOLDER = Path("migration")

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


Jobs = Annotated[Path, typer.Argument(metavar="JOBS", help="JSON or JSON lines of client.fine_tuning.jobs.list().")]
Files = Annotated[Path, typer.Option("--files", metavar="FOLDER", help="Validation files, named <file id>.jsonl.")]
Questions = Annotated[
    list[str] | None,
    typer.Option("--questions", metavar="JOB=FILE", help="Questions of a job that has no validation file."),
]
OnlyJobs = Annotated[list[str] | None, typer.Option("--job", help="Only this job. Can be repeated.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Questions of each job, drawn with a fixed seed.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer.")]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, max=512, help="Questions asked at once.")]


@migrate_app.command("record")
def record(
    jobs: Jobs,
    files: Files,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the answers are written.")],
    only: OnlyJobs = None,
    questions: Questions = None,
    server: Annotated[
        str, typer.Option(metavar="URL", help="The API that has the earlier models.")
    ] = "https://api.openai.com/v1",
    key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of that API.")] = None,
    limit: Limit = 200,
    max_tokens: MaxTokens = 256,
    concurrency: Concurrency = 8,
) -> None:
    """Record the answers of the earlier models to their validation files, while they still answer.

    They are the left side of `ft migrate compare`. Run again, it asks only what is missing. Exit code 1: some
    questions have no answer.
    """
    from ft_service.cli.evaluate_view import ProgressLine
    from ft_service.errors import DataError, UsageError
    from ft_service.evaluate.ask import Endpoint
    from ft_service.migrate.compare import Asking
    from ft_service.migrate.recorded import record as record_answers

    asking = Asking(limit=limit, max_tokens=max_tokens, concurrency=concurrency, questions=_questions(questions))
    is_complete = True
    for job in _planned(jobs, files, only):
        model = job.source.fine_tuned_model
        if job.outcome == "skipped" or model is None:
            continue
        shown = ProgressLine()
        try:
            count, remarks = record_answers(
                job,
                model,
                Endpoint(server, key),
                out,
                asking.held_out(job),
                asking.seed,
                concurrency,
                lambda done, total, job=job, shown=shown: shown(job.source.id, done, total),  # type: ignore[misc]
            )
        except (UsageError, DataError) as error:
            is_complete = False
            print_item(f"{job.source.id}  {model}", *str(error).split("\n"))
            continue
        is_complete = is_complete and not any("have no answer" in remark for remark in remarks)
        place = out / f"{job.source.id}.jsonl"
        print_item(f"{job.source.id}  {model}", f"{counted(count, 'answer')}: {place}", *remarks)
    if not is_complete:
        raise SystemExit(1)


@migrate_app.command("compare")
def compare(
    jobs: Jobs,
    files: Files,
    recorded: Annotated[Path, typer.Option(metavar="FOLDER", help="Recorded answers, named <job id>.jsonl.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the answers and the page are kept.")
    ] = _COMPARISON_FOLDER,
    only: OnlyJobs = None,
    questions: Questions = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="f1, exact, number, rouge_l, chrf. Can be repeated; the first counts."),
    ] = None,
    language: Annotated[str, typer.Option(help="Of the answers: en or ja.")] = "en",
    limit: Limit = 200,
    max_tokens: MaxTokens = 256,
    concurrency: Concurrency = 8,
    server: Annotated[str, typer.Option(metavar="URL", envvar="FT_SERVER", help="The server's address.")] = DEFAULT_URL,
    key: Annotated[str | None, typer.Option(envvar="FT_API_KEY", help="Key of that server.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the recorded answers of the earlier models with those of the new ones, with intervals.

    Writes a page. Run again, it asks only what is missing. Exit code 1: some jobs cannot be compared.
    """
    from ft_service.cli.evaluate_view import ProgressLine, comparison_table
    from ft_service.evaluate.ask import Endpoint
    from ft_service.migrate.compare import Asking, compare_jobs, comparison_page
    from ft_service.migrate.create import FineTuningServer

    asking = Asking(
        metrics=tuple(metric or ("f1",)),
        language=language,
        limit=limit,
        max_tokens=max_tokens,
        concurrency=concurrency,
        questions=_questions(questions),
    )
    connection = FineTuningServer(server, key)
    try:
        planned = _planned(jobs, files, only)
        endpoint = Endpoint(connection.url, key)
        found = compare_jobs(planned, connection, endpoint, recorded, out, asking, ProgressLine())
    finally:
        connection.close()
    out.mkdir(parents=True, exist_ok=True)
    page = out / "comparison.html"
    page.write_text(comparison_page(found), encoding="utf-8")
    if as_json:
        print_json([one.as_json() for one in found])
    else:
        for one in found:
            print_item(f"{one.new_model or '?'} against {one.old_model or one.source}", f"job {one.source}")
            if one.rows:
                console.print(comparison_table(one.rows, "earlier", "new"))
            for line in (one.sentence, *one.remarks):
                if line:
                    print_item(f"  {line}")
        print_item(str(page))
    if not found or any(one.comparison is None for one in found):
        raise SystemExit(1)


def _planned(jobs: Path, files: Path, only: list[str] | None) -> "list[MigrationJob]":
    """The jobs with their files. What a model is called here does not matter: new models are found by their origin."""
    from ft_service.migrate.exported import read_jobs
    from ft_service.migrate.mapping import Mapping
    from ft_service.migrate.migration import plan_migration

    return plan_migration(read_jobs(jobs), Mapping(), files, only=tuple(only or ()))


def _questions(pairs: list[str] | None) -> dict[str, Path]:
    from ft_service.errors import UsageError

    found = {}
    for pair in pairs or []:
        job, equals, file = pair.partition("=")
        if not equals or not Path(file).is_file():
            raise UsageError(f"--questions = {pair!r}: is no JOB=FILE of a file that exists.")
        found[job] = Path(file)
    return found


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
