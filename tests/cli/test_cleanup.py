"""`ft prune`, `ft du`, `ft runs delete` and `ft adapters delete` and `list` on the command line, as text and JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.cli.common import console
from ft_service.errors import UsageError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from tests.cleanup.cleanup_cases import publish, write_dataset, write_run


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A run whose adapter is published, a dataset that nothing uses, a run that never joined."""
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FT_STORAGE", str(tmp_path))
    storage = Storage(str(tmp_path))
    write_dataset(storage, "used")
    write_dataset(storage, "unused")
    write_run(storage, "done", "succeeded", "used")
    write_run(storage, "never-joined", "failed", joined=False)
    publish(storage, "done", "used")
    return storage


def ft(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def ft_json(*arguments: str) -> Any:
    return json.loads(ft(*arguments, "--json"))


def paths(storage: Storage) -> list[str]:
    return [file.path for file in storage.tree()]


def test_prune_shows_and_deletes_only_with_yes(storage: Storage) -> None:
    before = paths(storage)
    shown = ft_json("prune")
    assert paths(storage) == before
    fates = {item["id"]: item["goes"] for item in shown["items"]}
    [record] = Registry(storage).records()
    assert fates == {"never-joined": True, "unused": True, "done": False, "used": False, record.id: False}
    assert shown["deletions"] is None and 0 < shown["freed_bytes"] < shown["total_bytes"]
    assert {item["cure"] for item in shown["items"]} == {None, "ft runs delete done", f"ft adapters delete {record.id}"}
    text = ft("prune")
    assert "never joined a cluster" in text and "Nothing was deleted. Delete what goes with: ft prune --yes" in text
    assert "2 items go (" in text and "3 items stay." in text
    assert paths(storage) == before
    done = ft_json("prune", "--yes")
    assert [(each["id"], each["deleted"]) for each in done["deletions"]] == [("never-joined", True), ("unused", True)]
    assert sum(each["freed_bytes"] for each in done["deletions"]) == done["freed_bytes"]
    assert len(paths(storage)) < len(before)
    assert not any(item["goes"] for item in ft_json("prune")["items"])


def test_du_counts_everything(storage: Storage) -> None:
    storage.write_bytes("bases/mine/model.safetensors", b"x" * 5000)
    shown = ft_json("du")
    assert shown["items"][0] == {"kind": "other", "id": "bases", "bytes": 5000}
    assert shown["total_bytes"] == sum(item["bytes"] for item in shown["items"])
    assert shown["total_bytes"] == sum(file.stat().st_size for file in Path(storage.root).rglob("*") if file.is_file())
    assert "4.9 KiB" in ft("du") and "In total" in ft("du")
    storage.write_bytes("ray/r-1a2b/file", b"x")
    storage.write_bytes("mlflow/0/meta.yaml", b"x")
    assert "other: Ray Train's files of each attempt" in ft("du") and "other: MLflow's runs" in ft("du")


def test_an_adapter_is_listed_deleted_and_named_in_between(storage: Storage) -> None:
    [record] = Registry(storage).records()
    assert [each["id"] for each in ft_json("adapters", "list")] == [record.id]
    assert ft_json("adapters") == ft_json("adapters", "list")
    text = ft("adapters", "delete", record.id, "--yes")
    assert f"Hidden {record.id}" in text and "ft runs delete done" in text
    assert ft_json("adapters", "list") == []


def test_a_damaged_record_is_named_and_the_others_are_listed(storage: Storage) -> None:
    [record] = Registry(storage).records()
    other = publish(storage, "another", "used")
    Path(storage.root, "adapters", other.id, "record.json").write_text("{")
    done = CliRunner().invoke(app, ["adapters", "--json"], catch_exceptions=False)
    assert [each["id"] for each in json.loads(done.stdout)] == [record.id]
    assert f"not listed: {storage.root}/adapters/{other.id}/record.json: is damaged" in done.stderr


def test_deletions_print_json(storage: Storage) -> None:
    [record] = Registry(storage).records()
    deleted = ft_json("adapters", "delete", record.id, "--yes")
    assert (deleted["kind"], deleted["id"], deleted["deleted"]) == ("adapter", record.id, True)
    deleted = ft_json("runs", "delete", "done", "--yes")
    assert (deleted["kind"], deleted["id"], deleted["deleted"]) == ("run", "done", True)
    assert (
        [run["run_id"] for run in ft_json("runs")] == ["never-joined"] == [r["run_id"] for r in ft_json("runs", "list")]
    )


def test_an_option_before_the_subcommand_is_rejected(storage: Storage, tmp_path: Path) -> None:
    before = paths(storage)
    with pytest.raises(UsageError, match=r"--storage: comes before delete(?s:.*)ft runs delete \.\.\. --storage"):
        CliRunner().invoke(app, ["runs", "--storage", str(tmp_path), "delete", "done"], catch_exceptions=False)
    assert paths(storage) == before


@pytest.mark.parametrize("kind", ["runs", "adapters"])
def test_deleting_asks_first(storage: Storage, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    [record] = Registry(storage).records()
    what = "done" if kind == "runs" else record.id
    before = paths(storage)
    with pytest.raises(UsageError, match=rf"{what}(?s:.*)no terminal to ask on\. Pass --yes\."):
        ft(kind, "delete", what)
    monkeypatch.setattr("ft_service.cli.common._can_ask", lambda: True)
    refused = CliRunner().invoke(app, [kind, "delete", what], input="n\n", catch_exceptions=False)
    assert refused.exit_code == 1 and "Nothing was deleted." in refused.output and what in refused.output
    assert paths(storage) == before
    done = CliRunner().invoke(app, [kind, "delete", what], input="y\n", catch_exceptions=False)
    assert done.exit_code == 0 and paths(storage) != before


def test_ids_and_commands_are_whole_in_80_columns(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    [record] = Registry(storage).records()
    shown = [line.strip() for line in ft("prune").splitlines()]
    assert f"ft adapters delete {record.id}" in shown and "ft runs delete done" in shown
    assert any(line.startswith(record.id) for line in ft("adapters").splitlines())


def test_settings_are_listed_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 80)
    lines = ft("spec").splitlines()
    described = [line for line in lines if line.startswith("    ")]
    assert max(map(len, described)) <= 80 and sorted(map(len, described))[-20] > 60  # the whole width is used
    assert any(line.startswith("train.max_steps  ") for line in lines)
