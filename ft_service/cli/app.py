"""`ft`: the command-line interface. Exit codes: 0 success, 1 failure, 2 invalid usage or spec, 3 stopped.

Every command parses its arguments, calls one function of the package, and prints the result. Heavy packages are
imported inside the commands, so that `ft --help` and an invalid spec take no time.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from ft_service.cli.adapters import adapters_app
from ft_service.cli.cleanup import du, prune
from ft_service.cli.compare import compare
from ft_service.cli.data import data_app
from ft_service.cli.doctor import doctor
from ft_service.cli.evaluate import evaluate
from ft_service.cli.files import files_app
from ft_service.cli.jobs import jobs_app
from ft_service.cli.keys import keys_app
from ft_service.cli.migrate import migrate_app
from ft_service.cli.plan import plan
from ft_service.cli.queue import queue_app
from ft_service.cli.runs import logs, runs_app, show
from ft_service.cli.serve import serve, top
from ft_service.cli.spec import spec
from ft_service.cli.study import study_app
from ft_service.cli.train import resume, stop, submit, train
from ft_service.errors import exit_on_error

app = typer.Typer(
    help="Fine-tune Llama 3 on a Ray cluster: from a run spec to an adapter served over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"ft {version('ft-service')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of `ft` itself."""


app.command()(spec)
app.command()(plan)
app.command()(train)
app.command()(submit)
app.add_typer(runs_app, name="runs")
app.add_typer(queue_app, name="queue")
app.command()(show)
app.command()(logs)
app.command()(stop)
app.command()(resume)
app.add_typer(adapters_app, name="adapters")
app.add_typer(data_app, name="data")
app.command()(evaluate)
app.command()(compare)
app.command()(prune)
app.command()(du)
app.command()(serve)
app.command()(top)
app.add_typer(keys_app, name="keys")
app.add_typer(files_app, name="files")
app.add_typer(jobs_app, name="jobs")
app.add_typer(study_app, name="study")
app.add_typer(migrate_app, name="migrate")
app.command()(doctor)


def main() -> None:
    """Entry point of the `ft` command."""
    with exit_on_error():
        app()


if __name__ == "__main__":
    main()
