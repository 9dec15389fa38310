"""`ft keys`: API keys of the server, in the service's database."""

import dataclasses
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from ft_service.cli.common import AsJson, console, new_table, print_json
from ft_service.errors import UsageError

if TYPE_CHECKING:
    from sqlalchemy import Engine

keys_app = typer.Typer(help="API keys of the server, in the database FT_DATABASE_URL.", no_args_is_help=True)

Database = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="SQLAlchemy URL.", envvar="FT_DATABASE_URL", show_envvar=True),
]


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for.")],
    admin: Annotated[bool, typer.Option("--admin", help="May delete models.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="A model it may use, or the beginning of ids and *. Default: every model.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Of prompts and answers.")] = None,
    organization: Annotated[
        str | None, typer.Option(help="Its keys see each other's files and jobs. Default: this key sees its own only.")
    ] = None,
    expires_days: Annotated[int | None, typer.Option(min=1, help="Default: never.")] = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once: only its digest is stored."""
    from serve.database.keys import create_key

    expires = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    key, record = create_key(
        open_service_database(database),
        name,
        is_admin=admin,
        expires=expires,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        models=tuple(model) if model else None,
        organization=organization,
    )
    if as_json:
        print_json({"key": key, **dataclasses.asdict(record)})
    else:
        console.print(key, highlight=False, soft_wrap=True)
        console.print("Keep it now: it is not stored, and cannot be shown again.", style="dim")


@keys_app.command("list")
def list_all(database: Database = None, as_json: AsJson = False) -> None:
    """List all keys, without the keys themselves."""
    from serve.database.keys import list_keys

    keys = list_keys(open_service_database(database))
    if as_json:
        print_json([dataclasses.asdict(key) for key in keys])
        return
    table = new_table("name", "state", "admin", "organization", "models", "requests/min", "tokens/min", "created")
    for key in keys:
        state = "revoked" if key.revoked else "valid" if key.is_valid(datetime.now(UTC)) else "expired"
        table.add_row(
            key.name,
            state,
            "yes" if key.is_admin else "",
            key.organization or "",
            "all" if key.models is None else ", ".join(key.models),
            "" if key.requests_per_minute is None else str(key.requests_per_minute),
            "" if key.tokens_per_minute is None else str(key.tokens_per_minute),
            f"{key.created:%Y-%m-%d %H:%M}",
        )
    console.print(table)


@keys_app.command("revoke")
def revoke(name: str, database: Database = None) -> None:
    """Revoke a key for good. Servers refuse it within seconds."""
    from serve.database.keys import revoke_key

    revoke_key(open_service_database(database), name)
    console.print(f"Revoked {name}: servers refuse it from now on, at most 5 seconds later.", highlight=False)


@keys_app.command("log")
def log(
    last: Annotated[int, typer.Option(min=1, help="Number of entries.")] = 100,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Show the audit log: what was changed, and by which key."""
    from serve.database.audit import audit_log

    entries = audit_log(open_service_database(database), last)
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in entries])
        return
    table = new_table("time (UTC)", "key", "action", "target")
    for entry in entries:
        table.add_row(f"{entry.time:%Y-%m-%d %H:%M:%S}", entry.key, entry.action, entry.target)
    console.print(table)


def open_service_database(url: str | None) -> "Engine":
    """The service's database at `url` or FT_DATABASE_URL. Raises `UsageError` if neither is given."""
    from serve.database.database import open_database

    url = url or os.environ.get("FT_DATABASE_URL")
    if not url:
        raise UsageError(
            "FT_DATABASE_URL is not set: keys and studies are in a database. For one server, use a file on a local "
            "disk: export FT_DATABASE_URL=sqlite:////var/lib/ft/service.db"
        )
    return open_database(url)
