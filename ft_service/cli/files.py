"""`ft files`: files of a server, over HTTP: upload, list, show with all errors, download and delete them."""

import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from ft_service.cli.common import AsJson, Yes, confirm_deletion, console, new_table, print_item, print_json
from ft_service.cli.serve import DEFAULT_URL
from ft_service.cli.server_requests import Server, ask, moment, pages, save
from ft_service.errors import UsageError
from ft_service.text import counted, format_bytes

files_app = typer.Typer(help="Files of a server; its key is FT_API_KEY.", no_args_is_help=True)

FileId = Annotated[str, typer.Argument(metavar="FILE", help="Id of the file: file-...")]
UPLOAD_SECONDS = 600.0
"""So long the server may take to answer, or to read the next part."""
CHECK_POLL_SECONDS = 1.0
_SHOWN_ERRORS = 20


@files_app.command("upload")
def upload(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files to upload.")],
    purpose: Annotated[str, typer.Option(help="What they are for.")] = "fine-tune",
    expires_after: Annotated[
        float | None, typer.Option(metavar="HOURS", help="Delete them after so many hours, 1 to 720.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the check of training files.")] = True,
    server: Server = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Upload files. Exit code 1: a training file has errors, which are listed with their lines."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UsageError(f"FILE = {', '.join(missing)}: no such file.")
    made = []
    for path in paths:
        file = _send(server, path, purpose, expires_after)
        while wait and file["status"] == "uploaded" and purpose == "fine-tune":
            time.sleep(CHECK_POLL_SECONDS)
            file = ask(server, "GET", _path(file["id"]))
        made.append(file)
        if not as_json:
            _show(server, file, _SHOWN_ERRORS)
    if as_json:
        print_json(made)
    if any(file["status"] == "error" for file in made):
        raise SystemExit(1)


@files_app.command("list")
def list_all(
    last: Annotated[int, typer.Option(min=1, help="Number of files, the newest.")] = 20,
    purpose: Annotated[str | None, typer.Option(help="Only files for this, such as fine-tune.")] = None,
    server: Server = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List files, the newest first."""
    files: list[dict[str, Any]] = []
    for file in pages(server, "/files", {"purpose": purpose} if purpose else {}):
        files.append(file)
        if len(files) == last:
            break
    if as_json:
        print_json(files)
        return
    table = new_table("id", "name", "purpose", "status", "size", "examples", "created (UTC)", "expires (UTC)")
    for file in files:
        checked = file.get("validation") or {}
        table.add_row(
            file["id"],
            file["filename"],
            file["purpose"],
            file["status"],
            format_bytes(file["bytes"]),
            str(checked.get("examples", "")),
            moment(file["created_at"]),
            moment(file["expires_at"]),
        )
    console.print(table)


@files_app.command("show")
def show(
    file: FileId,
    errors: Annotated[int, typer.Option(min=0, help="Number of errors to print; --json has all.")] = _SHOWN_ERRORS,
    server: Server = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show one file: its check, its tokens, and what is wrong with which line."""
    found = ask(server, "GET", _path(file))
    if as_json:
        print_json({**found, "errors": list(pages(server, f"{_path(file)}/errors"))})
        return
    _show(server, found, errors)


@files_app.command("download")
def download(
    file: FileId,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Where to write it. It must not exist.")],
    server: Server = DEFAULT_URL,
) -> None:
    """Download the content of a file, such as a job's result file."""
    if path.exists():
        raise UsageError(f"PATH = {path}: exists already. Give another one.")
    save(server, f"{_path(file)}/content", path)
    console.print(f"{path}: {format_bytes(path.stat().st_size)}", highlight=False)


@files_app.command("delete")
def delete(file: FileId, yes: Yes = False, server: Server = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Delete a file. A job that uses it has a link of its own."""
    found = ask(server, "GET", _path(file))
    confirm_deletion(f"the file {found['id']} ({found['filename']})", yes)
    deleted = ask(server, "DELETE", _path(file))
    if as_json:
        print_json(deleted)
    else:
        print_item(f"{deleted['id']}  deleted")


def _send(server: str, path: Path, purpose: str, hours: float | None) -> dict[str, Any]:
    fields = {"purpose": purpose}
    if hours is not None:
        fields |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(round(hours * 3600))}
    with path.open("rb") as content:
        return ask(server, "POST", "/files", data=fields, files={"file": (path.name, content)}, timeout=UPLOAD_SECONDS)


def _show(server: str, file: dict[str, Any], most: int) -> None:
    facts = [
        f"name: {file['filename']}",
        f"purpose: {file['purpose']}",
        f"size: {format_bytes(file['bytes'])}",
        f"created: {moment(file['created_at'])} UTC",
    ]
    if file["expires_at"] is not None:
        facts.append(f"expires: {moment(file['expires_at'])} UTC")
    checked = file.get("validation")
    if checked is not None:
        facts.append(f"examples: {checked['examples']:,}, {checked['valid_examples']:,} of them valid")
        for count in checked["token_counts"]:
            facts.append(
                f"tokens for {', '.join(count['bases'])}: {count['tokens']:,}, {count['trained_tokens']:,} trained on; "
                f"longest example {count['longest_example']:,}"
            )
        if checked["errors"]:
            facts.append(f"{counted(checked['errors'], 'error')}:")
            facts += [f"  {_error_line(error)}" for error in _first_errors(server, file["id"], most)]
            if checked["errors"] > most:
                facts.append(f"  ... ft files show {file['id']} --json has all.")
    elif file["status_details"]:
        facts.append(file["status_details"])
    print_item(f"{file['id']}  {file['status']}", *(line for fact in facts for line in fact.split("\n")))


def _first_errors(server: str, file_id: str, most: int) -> list[dict[str, Any]]:
    errors: list[dict[str, Any]] = []
    for error in pages(server, f"{_path(file_id)}/errors"):
        if len(errors) == most:
            break
        errors.append(error)
    return errors


def _error_line(error: dict[str, Any]) -> str:
    place = "the file" if error["line"] is None else f"line {error['line']}"
    field = f", {error['field']}" if error["field"] else ""
    return f"{place}{field}: {error['code']}: {error['message']}"


def _path(file: str) -> str:
    return f"/files/{quote(file, safe='')}"
