"""`ft spec`: the settings of a run spec, as a list, JSON Schema, Markdown, or a file to start from."""

from typing import Annotated

import typer
from rich.text import Text

from ft_service.cli.common import AsJson, console, print_json, print_text
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
        for setting in reference.settings():
            default = setting.default if setting.default == reference.REQUIRED else f"default {setting.default}"
            console.print(Text.assemble((setting.path, "bold"), f"  {setting.type}; {default}"), soft_wrap=True)
            print_text(setting.description, indent=4)
