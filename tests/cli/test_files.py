"""`ft files` and `ft jobs create` against a real server of files, whose base has a tokenizer and answers nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.cli.common import console
from ft_service.errors import ServingError, UsageError
from tests.serve.fine_tuning.file_world import EXAMPLE, ROOT_KEY, FileServer, file_server, jsonl, write_tiny_base

GOOD = [{"messages": [{"role": "user", "content": f"Question {n}?"}, *EXAMPLE["messages"][1:]]} for n in range(12)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    base = write_tiny_base(tmp_path_factory.mktemp("base"))
    with file_server(base, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(autouse=True)
def address(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_SERVER", server.url)
    monkeypatch.setenv("FT_API_KEY", ROOT_KEY)
    monkeypatch.setattr(console, "_width", 200)


def ft(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def upload(folder: Path, records: list[object], name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_bytes(jsonl(*records))
    return str(json.loads(ft("files", "upload", str(path), "--json"))[0]["id"])


def test_a_file_is_uploaded_checked_listed_shown_downloaded_and_deleted(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl(*GOOD))
    text = ft("files", "upload", str(path), "--expires-after", "2")
    file_id = text.split()[0]
    assert text.splitlines()[0] == f"{file_id}  processed"
    assert "examples: 12, 12 of them valid" in text and "tokens for tiny:" in text and "expires:" in text
    assert ft("files", "show", file_id) == text
    listed = ft("files", "list", "--purpose", "fine-tune")
    assert [line.split()[0] for line in listed.splitlines()[1:]] == [file_id] and "train.jsonl" in listed
    assert [file["id"] for file in json.loads(ft("files", "list", "--json"))] == [file_id]
    ft("files", "download", file_id, str(tmp_path / "copy.jsonl"))
    assert (tmp_path / "copy.jsonl").read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        ft("files", "download", file_id, str(path))
    with pytest.raises(UsageError, match="Pass --yes"):
        ft("files", "delete", file_id)
    assert json.loads(ft("files", "delete", file_id, "--yes", "--json"))["deleted"] is True
    with pytest.raises(ServingError, match=file_id):
        ft("files", "show", file_id)
    with pytest.raises(ServingError, match=file_id):
        ft("files", "download", file_id, str(tmp_path / "gone.jsonl"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.jsonl", "train.jsonl"]


def test_a_bad_file_is_reported_by_line_and_field(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(jsonl(*GOOD, {"messages": [{"role": "robot", "content": "x"}]}, {"messages": 1}))
    text = ft("files", "upload", str(path), code=1)
    assert "  error" in text.splitlines()[0]
    assert "line 13, messages[0].role: unrecognized_role" in text and "line 14" in text
    file_id = text.split()[0]
    errors = json.loads(ft("files", "show", file_id, "--json"))["errors"]
    assert {error["line"] for error in errors} == {13, 14}
    assert "line 14" not in ft("files", "show", file_id, "--errors", "1")


def test_wrong_use_is_reported(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        ft("files", "upload", str(tmp_path / "none.jsonl"))
    with pytest.raises(UsageError, match="KEY=VALUE"):
        ft("jobs", "create", "tiny", "file-1", "--metadata", "team")
    with pytest.raises(ServingError, match="file-none"):
        ft("files", "show", "file-none")


def test_a_job_is_estimated_and_created_with_its_settings(tmp_path):
    training = upload(tmp_path, list(GOOD))
    options = ("tiny", training, "--epochs", "2", "--batch-size", "4", "--metadata", "waive.size.too-few=a test")
    text = ft("jobs", "create", *options, "--dry-run")
    assert "data: 12 examples" in text and "tokens: " in text and "n_epochs 2" in text
    assert "queue: it would start at once" in text
    estimate = json.loads(ft("jobs", "create", *options, "--dry-run", "--json"))
    assert estimate["object"] == "fine_tuning.job.estimate" and estimate["queue"]["place"] == 0
    assert json.loads(ft("jobs", "list", "--json")) == []
    text = ft("jobs", "create", *options, "--suffix", "x", "--seed", "3")
    assert "  validating_files" in text and "Waits for the check of its files" in text
    job_id = text.split()[0]
    shown = ft("jobs", "show", job_id)
    assert "seed: 3" in shown and "details: Waits for the check of its files" in shown
    assert "the check of its files" in ft("jobs", "list")
    job = json.loads(ft("jobs", "show", job_id, "--json"))
    assert job["metadata"] == {"waive.size.too-few": "a test"} and job["hyperparameters"]["n_epochs"] == 2
