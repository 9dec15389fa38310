"""`ft evaluate` and `jobs/evaluate.py`: arguments, exit codes, what they print, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import FtError, NotPublishedError, SpecError, UsageError
from ft_service.evaluate import launch
from ft_service.evaluate.ask import Endpoint
from ft_service.evaluate.server import started_server
from tests.evaluate.fake_server import ADAPTER, BASE, FakeServer, refused
from tests.evaluate.test_run import World, solves

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """What `--server` leads to."""
    fake = FakeServer({BASE: solves(0.9, 1), ADAPTER: solves(0.2, 2)})
    monkeypatch.setattr(launch, "Endpoint", lambda url, key: Endpoint(url, key, fake.endpoint.transport))
    monkeypatch.setenv("COLUMNS", "160")
    return fake


def ft(world: World, *arguments: str, exit_code: int = 0) -> Any:
    given = ["evaluate", ADAPTER, "--suite", str(world.suite), "--storage", world.storage.root, *arguments]
    done = CliRunner().invoke(app, given, catch_exceptions=isinstance(exit_code, int))
    assert done.exit_code == exit_code, done.output
    return done


def raised(kind: type[FtError], *arguments: str) -> str:
    with pytest.raises(kind) as error:
        CliRunner().invoke(app, ["evaluate", *arguments], catch_exceptions=False)
    return str(error.value)


def test_the_result_is_a_table_and_sentences(tmp_path, server):
    done = ft(World(tmp_path, 90), "--server", "http://fake")
    for expected in (
        f"{ADAPTER} against {BASE}",
        "arithmetic",
        "overall",
        "worse",
        "The adapter is worse",
        "It forgot:",
        "Perplexity of 90 general texts",
        "Lost: item-",
    ):
        assert expected in done.stdout, expected
    assert "Answers on storage, questions: 360 of 360" in done.stderr


def test_json_is_the_stored_result(tmp_path, server):
    world = World(tmp_path, 9)
    result = json.loads(ft(world, "--server", "http://fake", "--json").stdout)
    assert result == world.storage.read_json(f"evaluations/{result['id']}/evaluation.json")


def test_an_incomplete_evaluation_is_shown_and_fails(tmp_path, server):
    server.fault = lambda number: refused(400, "too long") if number == 1 else None
    done = ft(World(tmp_path, 9), "--server", "http://fake", "--concurrency", "1", exit_code=1)
    assert "1 question without an answer" in done.stdout
    assert "item-000" in done.stdout and "too long" in done.stdout


def test_what_cannot_work_is_refused_before_a_server_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "started_server", lambda *_: pytest.fail("a server was started"))
    world = World(tmp_path, 3)
    suite = ("--suite", str(world.suite), "--storage", world.storage.root)
    assert "not published" in raised(NotPublishedError, "nobody", *suite)
    assert "no-such-suite" in raised(SpecError, "nobody", "--suite", "no-such-suite")
    text = raised(UsageError, "nobody", *suite, "--server", "http://x", "--base", "/models/x")
    assert "--base = '/models/x': only applies without --server" in text


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/evaluate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.multiprocess
def test_a_server_started_for_an_evaluation_gives_up_at_once_when_it_is_stopped(monkeypatch):
    """`ray job stop` kills it three seconds after its signal."""
    commands = []

    def popen(command: list[str], **_: object) -> None:
        commands.append(command)
        raise OSError("not started")

    monkeypatch.setattr("ft_service.evaluate.server.subprocess.Popen", popen)
    with pytest.raises(OSError, match="not started"), started_server("storage", "base"):
        pass
    (command,) = commands
    assert command[command.index("--stop-seconds") + 1] == "0"


def test_the_job_refuses_what_cannot_work(tmp_path):
    world = World(tmp_path, 3)
    suite = ("--suite", str(world.suite))
    done = job("nobody", *suite)
    assert done.returncode == 2 and "--storage: names no root" in done.stderr
    done = job("nobody", *suite, "--storage", world.storage.root, "--concurrency", "0")
    assert done.returncode == 2 and "--concurrency = 0: must be at least 1" in done.stderr
    done = job("nobody", *suite, "--storage", world.storage.root)
    assert done.returncode == 1 and "'nobody': not published" in done.stderr
