"""Options of `ft` itself, and help that every command has."""

import re
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import UsageError

ROOT = typer.main.get_command(app)
COMMANDS = [[name] for name in ROOT.commands]  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"ft {version('ft-service')}\n")


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=lambda words: " ".join(words) or "ft")
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help_under_both_names(command: list[str], option: str) -> None:
    result = CliRunner().invoke(app, [*command, option])
    assert result.exit_code == 0 and re.search(r"Usage: .*", result.output)


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output


def test_detach_without_an_address_is_refused() -> None:
    with pytest.raises(UsageError, match="--detach: no effect without --address"):
        CliRunner().invoke(app, ["resume", "r", "--detach"], catch_exceptions=False)
