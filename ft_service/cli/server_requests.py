"""Requests of commands to a server, with its key from FT_API_KEY, and its errors as those of `ft`."""

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ft_service.errors import ServingError, UsageError

Server = Annotated[str, typer.Option("--server", metavar="URL", envvar="FT_SERVER", help="The server's address.")]
TIMEOUT_SECONDS = 30.0
_PAGE = 100


def pages(server: str, path: str, query: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The items of a list, page after page."""
    after = None
    while True:
        page = ask(server, "GET", path, {"limit": _PAGE, **(query or {}), **({"after": after} if after else {})})
        yield from page["data"]
        if not page.get("has_more") or not page["data"]:
            return
        after = page["data"][-1]["id"]


def ask(server: str, method: str, path: str, query: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """The reply to a request. `options` are httpx's, such as `json`. Raises `ServingError` or `UsageError`."""
    import httpx

    try:
        response = httpx.request(
            method,
            address_of(server) + path,
            params=query,
            headers=headers(),
            **{"timeout": TIMEOUT_SECONDS, **options},
        )
    except httpx.InvalidURL:
        raise no_address(server) from None
    except httpx.HTTPError as error:
        raise silent(server, error) from None
    return checked(server, response.status_code, response.content)


def checked(server: str, status: int, content: bytes) -> dict[str, Any]:
    """The reply, from its JSON. Raises `ServingError` with the server's message."""
    import json

    try:
        reply = json.loads(content)
    except ValueError:
        reply = None
    if status < 400 and isinstance(reply, dict):
        return reply
    try:
        reason = reply["error"]["message"]
    except (KeyError, TypeError):
        reason = f"answers {status}, so it is no server of ft serve"
    raise ServingError(f"--server = {server!r}: {reason}")


def headers() -> dict[str, str]:
    """The key, where there is one."""
    key = os.environ.get("FT_API_KEY", "").strip()
    return {"authorization": f"Bearer {key}"} if key else {}


def address_of(server: str) -> str:
    """The API of a server."""
    return server.rstrip("/").removesuffix("/v1") + "/v1"


def no_address(server: str) -> UsageError:
    """The error of a server whose address cannot be one."""
    return UsageError(f"--server = {server!r}: is no address. Use http://HOST:PORT.")


def silent(server: str, error: Exception) -> ServingError:
    """The error of a server that does not answer."""
    return ServingError(f"--server = {server!r}: does not answer ({type(error).__name__}). Is the server up?")


def moment(seconds: int | None) -> str:
    """A time of the API, in UTC; empty for none."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def save(server: str, path: str, target: Path) -> None:
    """Write the content that a path of the server has to a file. A download that fails leaves none."""
    import httpx

    partial = target.with_name(f"{target.name}.part")
    try:
        with httpx.stream("GET", address_of(server) + path, headers=headers(), timeout=TIMEOUT_SECONDS) as response:
            if not response.is_success:
                checked(server, response.status_code, response.read())
            with partial.open("wb") as file:
                for block in response.iter_bytes():
                    file.write(block)
        partial.rename(target)
    except httpx.InvalidURL:
        raise no_address(server) from None
    except httpx.HTTPError as error:
        raise silent(server, error) from None
    finally:
        partial.unlink(missing_ok=True)
