"""`ft serve`: the HTTP server."""

from typing import Annotated

import typer

from ft_service.cli.common import DEFAULT_STORAGE, StorageRoot


def serve(
    storage: StorageRoot = DEFAULT_STORAGE,
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder (default: the base of all published adapters).")
    ] = None,
    host: Annotated[str, typer.Option(help="Any address except loopback requires FT_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[
        str, typer.Option(help="Name of the application. With a name of its own, a second server answers at /NAME/v1.")
    ] = "ft",
) -> None:
    """Serve a base and all adapters published for it over an OpenAI-compatible HTTP API."""
    from serve.run import run_server

    run_server(storage, base, host, port, name=name)
