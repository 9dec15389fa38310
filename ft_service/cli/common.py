"""What several commands share: options, the console, and output as JSON or a table."""

import json
import sys
import textwrap
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ft_service.errors import UsageError

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Run spec (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[setting=value]...", help="Override settings: train.max_steps=10.")
]
RunId = Annotated[str | None, typer.Option("--run-id", help="Id of the run (default: <name>-<8 hex>).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
StorageRoot = Annotated[
    str, typer.Option("--storage", envvar="FT_STORAGE", help="Storage root: a folder, or an s3://, gs:// or az:// URI.")
]
DEFAULT_STORAGE = "storage"

console = Console()

Yes = Annotated[bool, typer.Option("--yes", help="Delete without a question, as a script does.")]


def confirm_deletion(what: str, yes: bool) -> None:
    """Ask on the terminal whether to delete `what`; exit with 1 if not.

    Raises `UsageError` where nobody can answer and `yes` is False.
    """
    if yes:
        return
    if not _can_ask():
        raise UsageError(f"{what}: is not deleted without an answer, and there is no terminal to ask on. Pass --yes.")
    if not typer.confirm(f"Delete {what}?", err=True):
        console.print("Nothing was deleted.")
        raise SystemExit(1)


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def reject_options_before_subcommand(context: typer.Context) -> None:
    """Raise `UsageError` for ``ft runs --storage S delete R``, where the subcommand would not see the option."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            group = context.info_name
            raise UsageError(
                f"{parameter.opts[0]}: comes before {context.invoked_subcommand}, which does not see it there. "
                f"Write it behind: ft {group} {context.invoked_subcommand} ... {parameter.opts[0]} ..."
            )


def new_table(*columns: str) -> Table:
    """A table that never truncates or wraps its first column, so that it can be copied."""
    table = Table(*columns, box=None)
    table.columns[0].no_wrap = True
    return table


def print_item(head: str, *details: str) -> None:
    """One item of a list: a line, and its details below it. Ids and commands stay whole, so they can be copied."""
    for line in (head, *(f"  {detail}" for detail in details)):
        console.print(line, highlight=False, soft_wrap=True)


def print_text(text: str, indent: int = 2) -> None:
    """A paragraph, indented and wrapped between words: a path stays whole, and a pipe gets no spaces at line ends."""
    width = max(console.width - indent, 1)
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False):
        console.print(" " * indent + line, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output; moments in ISO 8601."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=_json_value))


def _json_value(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a value of JSON")
