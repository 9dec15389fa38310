"""What several commands share: options, the console, and output as JSON or a table."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Run spec (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[setting=value]...", help="Override settings: train.max_steps=10.")
]
RunId = Annotated[str | None, typer.Option("--run-id", help="Id of the run (default: <name>-<8 hex>).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
StorageRoot = Annotated[
    str, typer.Option("--storage", envvar="FT_STORAGE", help="Storage root: a folder, or an s3:// or gs:// URI.")
]
DEFAULT_STORAGE = "storage"

console = Console()


def new_table(*columns: str) -> Table:
    """A table that never truncates or wraps its first column, so that it can be copied."""
    table = Table(*columns, box=None)
    table.columns[0].no_wrap = True
    return table


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
