"""`ft jobs` against the real routes over jobs that a controller has driven."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.cli.common import console
from ft_service.errors import ServingError, UsageError
from serve.fine_tuning.job_routes import job_routes
from serve.fine_tuning.jobs import Jobs
from serve.http.access import AccessLog
from serve.http.errors import answer_errors_in_openai_shape
from serve.http.in_flight import InFlight
from serve.http.keys import RequireKey
from serve.settings import FineTuningSettings, ServeSettings
from tests.browser import served
from tests.serve.fine_tuning.job_world import World, make_world

KEY = "a-key-of-this-test"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A server at FT_SERVER, with its key in FT_API_KEY."""
    world = make_world(tmp_path)
    settings = ServeSettings(storage=world.storage.root, fine_tuning=FineTuningSettings())
    api = FastAPI()
    answer_errors_in_openai_shape(api)
    files: object = None
    jobs = Jobs(world.records, world.storage, settings, files)  # type: ignore[arg-type]
    api.include_router(job_routes(jobs, "acme", InFlight()))
    api.add_middleware(RequireKey, root_key=KEY)
    api.add_middleware(AccessLog)
    with served(api) as url:
        monkeypatch.setenv("FT_SERVER", url)
        monkeypatch.setenv("FT_API_KEY", KEY)
        monkeypatch.setenv("COLUMNS", "200")
        yield world


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 200)


def ft(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["jobs", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_list_shows_jobs_and_selects_by_status(world):
    done = world.until(world.job("a"), "succeeded")
    world.clock.forward(60)
    queued = world.job("b")
    lines = ft("list").splitlines()
    assert [line.split()[0] for line in lines[1:]] == [queued.id, done.id]
    assert "validating_files" in lines[1] and done.alias in lines[2]
    assert [job["id"] for job in json.loads(ft("list", "--status", "succeeded", "--json"))] == [done.id]
    assert [job["id"] for job in json.loads(ft("list", "--last", "1", "--json"))] == [queued.id]


def test_show_gives_the_reason_of_a_failure(world):
    world.ray.finishes = "failed"
    failed = world.until(world.job(), "failed")
    text = ft("show", failed.id)
    assert f"{failed.id}  failed" in text and "error: training_failed:" in text and "loss is nan" in text
    assert json.loads(ft("show", failed.id, "--json"))["error"]["code"] == "training_failed"


def test_events_are_printed_oldest_first_and_followed_to_the_end(world):
    done = world.until(world.job(), "succeeded")
    lines = ft("events", done.id).splitlines()
    assert lines[-1].endswith("The job has successfully completed")
    assert any("Step 4/4" in line for line in lines)
    assert ft("events", done.id, "--follow").splitlines() == lines
    assert [event["message"] for event in json.loads(ft("events", done.id, "--last", "2", "--json"))] == [
        line[20:] for line in lines[-2:]
    ]


def test_jobs_are_paused_resumed_and_cancelled(world):
    job = world.job()
    assert ft("pause", job.id) == f"{job.id}  paused\n"
    assert ft("resume", job.id) == f"{job.id}  validating_files\n"
    assert json.loads(ft("cancel", job.id, "--json"))["status"] == "cancelled"
    with pytest.raises(ServingError, match="has been cancelled already"):
        ft("cancel", job.id)


def test_errors_name_the_server_and_the_reason(world, monkeypatch):
    with pytest.raises(ServingError, match="ftjob-none"):
        ft("show", "ftjob-none")
    with pytest.raises(ServingError, match="does not answer"):
        ft("list", "--server", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match="is no address"):
        ft("list", "--server", "http://h:x")
    monkeypatch.setenv("FT_API_KEY", "wrong")
    with pytest.raises(ServingError, match="Incorrect API key"):
        ft("list")
