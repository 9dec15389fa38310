"""`ft top` and `ft keys` on the command line, as text and JSON."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import DatabaseError, ServingError, UsageError
from serve.database.database import open_database
from serve.database.keys import find_key

STATS = {
    "tiny": [
        {
            "running": 3,
            "waiting": 2,
            "cache_used": 0.25,
            "loaded_adapters": ["ab" * 32],
            "adapter_bytes": 5 * 2**20,
            "counters": {"generated_tokens": 100, "prompt_tokens": 50},
        }
    ],
    "asleep": [],
}
KEY = "a-key-of-this-test"


def ft(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server at one address, with one key; the addresses that were asked."""
    asked: list[str] = []
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FT_API_KEY", KEY)

    def get(url: str, headers: dict[str, str], timeout: float) -> httpx.Response:
        asked.append(url)
        if not url.startswith("http://127.0.0.1:8000/"):
            raise httpx.ConnectError("refused")
        if url != "http://127.0.0.1:8000/v1/stats":
            return httpx.Response(404, text="Path not found")
        if headers != {"authorization": f"Bearer {KEY}"}:
            return httpx.Response(401, json={"error": {"message": "Incorrect API key."}})
        return httpx.Response(200, json=STATS)

    monkeypatch.setattr("httpx.get", get)
    return asked


def test_top_shows_a_line_for_each_replica_and_bases_without_one(server: list[str]) -> None:
    lines = ft("top", "--once").splitlines()
    [tiny] = [line for line in lines if "tiny" in line]
    assert all(part in tiny for part in ("3", "2", "25%", "1 (5 MiB)"))
    [asleep] = [line for line in lines if "asleep" in line]
    assert "none" in asleep


def test_top_prints_what_the_server_sends_as_json(server: list[str]) -> None:
    assert json.loads(ft("top", "--json")) == STATS
    assert json.loads(ft("top", "--json", "--url", "http://127.0.0.1:8000/v1/")) == STATS


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("http://127.0.0.1:9999", "Is the server up"),
        ("http://127.0.0.1:8000/other", "answers 404"),
        ("no address", "does not answer"),
    ],
)
def test_top_names_an_address_where_no_server_answers(server: list[str], url: str, part: str) -> None:
    with pytest.raises(ServingError, match=part) as error:
        ft("top", "--once", "--url", url)
    assert url in str(error.value)


def test_top_says_that_the_key_is_wrong_and_does_not_show_it(
    server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_API_KEY", "wrong-key")
    with pytest.raises(ServingError, match="Incorrect API key") as error:
        ft("top", "--once")
    assert "wrong-key" not in str(error.value)


def test_top_computes_rates_from_two_looks(server: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_service.cli.serve import _table

    later = json.loads(json.dumps(STATS))
    later["tiny"][0]["counters"] = {"generated_tokens": 300, "prompt_tokens": 50}
    cells = [next(iter(column.cells)) for column in _table(later, STATS, 2.0).columns]
    assert cells[-2:] == ["100", "0"]
    replaced = [next(iter(column.cells)) for column in _table(STATS, later, 2.0).columns]
    assert replaced[-2] == ""  # a replica that was replaced counts from zero


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path}/service.db"
    monkeypatch.setenv("FT_DATABASE_URL", url)
    monkeypatch.setenv("COLUMNS", "200")
    return url


def ft_json(*arguments: str) -> Any:
    return json.loads(ft(*arguments, "--json"))


def test_a_created_key_opens_and_is_shown_once(database: str) -> None:
    key = ft("keys", "create", "ci", "--model", "tiny-*", "--requests-per-minute", "60").splitlines()[0].strip()
    record = find_key(open_database(database), key)
    assert record and (record.name, record.models, record.requests_per_minute) == ("ci", ("tiny-*",), 60)
    assert not record.is_admin
    assert key not in ft("keys", "list") + json.dumps(ft_json("keys", "list")) + ft("keys", "log")


def test_keys_are_listed_with_their_state_and_what_they_may_do(database: str) -> None:
    ft("keys", "create", "boss", "--admin")
    ft("keys", "create", "ci", "--model", "a", "--model", "b-*", "--tokens-per-minute", "1000")
    ft("keys", "revoke", "boss")
    boss, ci = [line for line in ft("keys", "list").splitlines() if "boss" in line or "ci" in line]
    assert "revoked" in boss and "yes" in boss and "all" in boss
    assert "valid" in ci and "a, b-*" in ci and "1000" in ci
    assert [key["name"] for key in ft_json("keys", "list")] == ["boss", "ci"]


def test_a_key_as_json_has_its_text_and_its_record(database: str) -> None:
    created = ft_json("keys", "create", "ci", "--expires-days", "1")
    record = find_key(open_database(database), created["key"])
    assert record and record.id == created["id"] and record.expires


def test_the_log_has_what_was_changed(database: str) -> None:
    ft("keys", "create", "ci")
    ft("keys", "revoke", "ci")
    assert [(one["action"], one["target"]) for one in ft_json("keys", "log")] == [
        ("keys.create", "ci"),
        ("keys.revoke", "ci"),
    ]
    assert "keys.revoke" in ft("keys", "log")


def test_wrong_names_and_databases_are_errors_with_a_cure(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ft("keys", "create", "ci")
    with pytest.raises(UsageError, match="a key of this name exists"):
        ft("keys", "create", "ci")
    with pytest.raises(UsageError, match="no key has this name"):
        ft("keys", "revoke", "other")
    with pytest.raises(DatabaseError, match="FT_DATABASE_URL"):
        ft("keys", "list", "--database", "nonsense")
    monkeypatch.delenv("FT_DATABASE_URL")
    with pytest.raises(UsageError, match="export FT_DATABASE_URL=sqlite"):
        ft("keys", "list")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--host", "0.0.0.0"), ("--port", "8001"), ("--base", "b"), ("--dtype", "float32"), ("--stop-seconds", "1")],
)
def test_what_a_config_file_decides_is_no_option_beside_it(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{option}.*: conflicts? with --config. Set .* in the file"):
        ft("serve", "--config", "serve/config.yaml", option, value)
