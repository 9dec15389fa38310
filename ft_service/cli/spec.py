"""`ft spec`: the settings of a run spec, as a table, JSON Schema, Markdown, or a file to start from."""

from typing import Annotated

import typer

from ft_service.cli.common import AsJson, console, new_table, print_json
from ft_service.errors import UsageError


def spec(
    as_json: AsJson = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print a spec to start from, with every setting.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md.")] = False,
) -> None:
    """Print every setting of a run spec: its type, default and meaning. --json prints JSON Schema for editors."""
    from ft_service.spec import reference

    if as_json + as_yaml + as_markdown > 1:
        raise UsageError("--json, --yaml, --markdown: use one of them.")
    if as_json:
        print_json(reference.json_schema())
    elif as_yaml:
        print(reference.as_yaml(), end="")
    elif as_markdown:
        print(reference.as_markdown(), end="")
    else:
        table = new_table("setting", "type", "default", "meaning")
        for setting in reference.settings():
            table.add_row(setting.path, setting.type, setting.default, setting.description)
        console.print(table)
