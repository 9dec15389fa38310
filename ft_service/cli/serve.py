"""`ft serve`: the HTTP server. `ft top`: what it does at this moment."""

import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ft_service.cli.common import DEFAULT_STORAGE, AsJson, StorageRoot, console, new_table, print_json
from ft_service.errors import ServingError, UsageError

DEFAULT_URL = "http://127.0.0.1:8000"
_MIB = 2**20
_HOST = "127.0.0.1"
_PORT = 8000


def serve(
    storage: StorageRoot = DEFAULT_STORAGE,
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder (default: the base of all published adapters).")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"] | None,
        typer.Option(help="What the base computes in (default: the checkpoint's own)."),
    ] = None,
    host: Annotated[str, typer.Option(help="Any address except loopback requires FT_API_KEY.")] = _HOST,
    port: Annotated[int, typer.Option(min=1, max=65535)] = _PORT,
    name: Annotated[
        str, typer.Option(help="Name of the application. With a name of its own, a second server answers at /NAME/v1.")
    ] = "ft",
    stop_seconds: Annotated[
        float | None, typer.Option(min=0, help="How long answers go on after Ctrl-C or SIGTERM (default: 60).")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A Ray Serve config such as serve/config.yaml: several bases, engines, limits."),
    ] = None,
) -> None:
    """Serve a base and all adapters published for it over an OpenAI-compatible HTTP API."""
    from serve.run import run_config, run_server

    if config is not None:
        if (host, port) != (_HOST, _PORT):
            raise UsageError("--host, --port: conflict with --config. Set http_options in the file.")
        if base is not None:
            raise UsageError("--base: conflicts with --config. Set bases in the file.")
        if dtype is not None:
            raise UsageError("--dtype: conflicts with --config. Set dtype of each base in the file.")
        if stop_seconds is not None:
            raise UsageError("--stop-seconds: conflicts with --config. Set limits.stop_seconds in the file.")
        run_config(config, name)
    else:
        run_server(storage, base, host, port, name=name, dtype=dtype, stop_seconds=stop_seconds)


def top(
    url: Annotated[str, typer.Option(help="The server's address; its key is FT_API_KEY.")] = DEFAULT_URL,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a server: what each replica works on, tokens a second, cache and adapters."""
    from rich.live import Live

    stats = _stats(url)
    if as_json:
        print_json(stats)
        return
    if once:
        console.print(_table(stats, {}, 0))
        return
    with Live(_table(stats, {}, 0), console=console, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            try:
                time.sleep(every)
            except KeyboardInterrupt:
                return
            before = stats
            stats = _stats(url)
            live.update(_table(stats, before, time.monotonic() - began), refresh=True)


def _stats(url: str) -> dict[str, list[dict[str, Any]]]:
    import httpx

    key = os.environ.get("FT_API_KEY", "").strip()
    address = url.rstrip("/").removesuffix("/v1") + "/v1/stats"
    try:
        response = httpx.get(address, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServingError(f"--url = {url!r}: does not answer ({type(error).__name__}). Is the server up?") from None
    if not response.is_success:
        try:
            reason = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            reason = f"answers {response.status_code}, so it is no server of ft serve"
        raise ServingError(f"--url = {url!r}: {reason}")
    stats: dict[str, list[dict[str, Any]]] = response.json()
    return stats


def _table(stats: dict[str, list[dict[str, Any]]], before: dict[str, list[dict[str, Any]]], seconds: float) -> Any:
    table = new_table("base", "replica", "running", "waiting", "cache", "adapters", "tokens/s", "prompt tokens/s")
    for base, replicas in stats.items():
        if not replicas:
            table.add_row(base, "none", *[""] * 6)
        for number, replica in enumerate(replicas):
            earlier = before.get(base, [])
            counters = earlier[number]["counters"] if number < len(earlier) else None
            table.add_row(
                base,
                str(number + 1),
                str(replica["running"]),
                str(replica["waiting"]),
                f"{replica['cache_used']:.0%}",
                f"{len(replica['loaded_adapters'])} ({replica['adapter_bytes'] / _MIB:.0f} MiB)",
                _rate(replica["counters"], counters, "generated_tokens", seconds),
                _rate(replica["counters"], counters, "prompt_tokens", seconds),
            )
    return table


def _rate(now: dict[str, float], before: dict[str, float] | None, name: str, seconds: float) -> str:
    new = now.get(name, 0) - before.get(name, 0) if before is not None else -1
    return f"{new / seconds:.0f}" if seconds and new >= 0 else ""  # a replica that was replaced starts from 0
