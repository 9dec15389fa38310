"""`ft migrate record` and `compare`: earlier models' recorded answers against those of the new models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import DataError
from ft_service.evaluate.ask import Endpoint
from ft_service.migrate import create, recorded
from ft_service.migrate.compare import Asking, JobComparison, compare_jobs, comparison_page
from ft_service.migrate.exported import ExportedJob
from ft_service.migrate.mapping import Mapping
from ft_service.migrate.migration import MigrationJob, plan_migration
from tests.evaluate.fake_server import FakeServer, question_in
from tests.migrate.openai_export import exported
from tests.migrate.openai_stand_in import StandIn

OLD = exported()["fine_tuned_model"]
NEW = "ft:llama:ft:desk:0a1b2c3d"
COUNT = 60


def reference(question: str) -> str:
    return f"word {question.split()[-1]}"


def conversation(number: int, answer: str | None = None) -> dict[str, Any]:
    question = f"Question number {number}"
    return {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": reference(question) if answer is None else answer},
        ]
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def half_right(body: dict[str, Any]) -> str:
    question = question_in(body)
    return reference(question) if int(question.split()[-1]) % 2 else "something else"


def right(body: dict[str, Any]) -> str:
    return reference(question_in(body))


def server_of(**answers: Any) -> FakeServer:
    return FakeServer(answers, digests=dict.fromkeys(answers, "none"))


@dataclass
class World:
    folder: Path
    stand_in: StandIn

    @property
    def recorded(self) -> Path:
        return self.folder / "recorded"

    def planned(self, **changes: Any) -> list[MigrationJob]:
        source = ExportedJob.model_validate(exported(validation_file="file-valid", **changes))
        return plan_migration([source], Mapping(), self.folder / "files")

    def compare(self, answers: FakeServer, jobs: list[MigrationJob] | None = None, **asking: Any) -> JobComparison:
        connection = self.stand_in.connect()
        planned = jobs or self.planned()
        (found,) = compare_jobs(
            planned, connection, answers.endpoint, self.recorded, self.folder / "out", Asking(**asking)
        )
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    write(tmp_path / "files" / "file-train.jsonl", [conversation(number) for number in range(100, 120)])
    write(tmp_path / "files" / "file-valid.jsonl", [conversation(number) for number in range(COUNT)])
    job = {
        "id": "ftjob-new",
        "status": "succeeded",
        "fine_tuned_model": NEW,
        "metadata": {"migrated_from": "ftjob-old1"},
    }
    return World(tmp_path, StandIn(jobs=[job]))


def record(world: World, answers: FakeServer, **asking: Any) -> tuple[int, list[str]]:
    (job,) = world.planned()
    settings = Asking(**asking)
    return recorded.record(
        job, OLD, answers.endpoint, world.recorded, settings.held_out(job), settings.seed, concurrency=4
    )


def test_a_better_model_is_called_better_with_its_interval(world):
    old = server_of(**{OLD: half_right})
    assert record(world, old) == (COUNT, [])
    assert old.bodies[0]["messages"][0] == {"role": "system", "content": "Answer briefly."}
    rows = [json.loads(line) for line in (world.recorded / "ftjob-old1.jsonl").read_text().splitlines()]
    assert len(rows) == COUNT and rows[0].keys() == {"messages"}
    new = server_of(**{NEW: right})
    found = world.compare(new, metrics=("exact", "f1"))
    overall = found.comparison.overall
    assert (overall.items, overall.base, overall.adapter, overall.verdict) == (COUNT, 0.5, 1.0, "better")
    assert 0 < overall.low < 0.5 < overall.high
    assert [row.name for row in found.rows] == ["exact", "f1"] and found.remarks == []
    assert found.sentence.startswith("The new model is better: +50.0 points")
    asked = len(new.bodies)
    assert asked == COUNT
    assert world.compare(new, metrics=("exact", "f1")).comparison == found.comparison and len(new.bodies) == asked


def test_equal_models_are_not_settled_and_a_worse_one_is_worse(world):
    record(world, server_of(**{OLD: half_right}))
    assert world.compare(server_of(**{NEW: half_right})).comparison.overall.verdict == "not settled"
    world.stand_in.jobs[0]["id"] = "ftjob-newer"
    found = world.compare(server_of(**{NEW: lambda body: "nothing of it"}))
    assert found.comparison.overall.verdict == "worse" and found.comparison.overall.lost == COUNT // 2


def test_recording_that_was_interrupted_asks_only_what_is_missing(world):
    import httpx

    server = server_of(**{OLD: right})
    server.fault = lambda number: httpx.Response(401, json={"error": {"message": "no"}}) if number > 40 else None
    count, remarks = record(world, server)
    assert 0 < count < COUNT and "have no answer" in remarks[-1]
    server.fault = lambda number: None
    asked = len(server.bodies)
    assert record(world, server) == (COUNT, [])
    assert len(server.bodies) - asked == COUNT - count
    with pytest.raises(DataError, match="answered no question"):
        record(world, server_of(), max_tokens=7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fine_tuned_model": None, "status": "running"}, "has no model yet"),
        ({"metadata": {"migrated_from": "ftjob-other"}}, "has no job on the server"),
    ],
)
def test_a_job_without_a_new_model_is_named(world, change, reason):
    record(world, server_of(**{OLD: right}))
    world.stand_in.jobs[0].update(change)
    if "metadata" in change:
        world.stand_in.jobs.clear()
    found = world.compare(server_of(**{NEW: right}))
    assert found.comparison is None and reason in found.remarks[0]


def test_what_cannot_be_compared_is_named(world):
    assert "ft migrate record" in world.compare(server_of(**{NEW: right})).remarks[0]
    write(world.recorded / "ftjob-old1.jsonl", [conversation(number, "x") for number in range(5)])
    found = world.compare(server_of(**{NEW: right}))
    assert found.comparison.overall.items == 5 and "55 questions without a recorded answer" in found.remarks[0]
    (without,) = plan_migration([ExportedJob.model_validate(exported())], Mapping(), world.folder / "files")
    assert "--questions ftjob-old1=FILE" in world.compare(server_of(**{NEW: right}), [without]).remarks[0]
    questions = {"ftjob-old1": world.folder / "files" / "file-valid.jsonl"}
    assert world.compare(server_of(**{NEW: right}), [without], questions=questions).comparison.overall.items == 5
    (world.folder / "files" / "file-valid.jsonl").unlink()
    assert "not in --files" in world.compare(server_of(**{NEW: right})).remarks[0]


def test_conversations_with_tools_are_left_out_and_counted(world):
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    asked = {"role": "user", "content": "Find it"}
    with_tools = {"messages": [asked, {"role": "assistant", "tool_calls": [call]}], "tools": tools}
    rows = [conversation(number) for number in range(COUNT)]
    write(world.folder / "files" / "file-valid.jsonl", [with_tools, *rows, with_tools, {"messages": "none"}])
    _, remarks = record(world, server_of(**{OLD: half_right}))
    found = world.compare(server_of(**{NEW: right}))
    assert found.comparison.overall.items == COUNT
    for shown in (remarks, found.remarks):
        assert "2 conversations with tools left out: no metric scores the calls of an answer." in shown[0]
        assert "1 record cannot be asked" in shown[1] and "uses tools" not in shown[1]


def test_the_page_shows_the_comparison_and_escapes_answers(world):
    evil = "<script>alert(1)</script>"
    record(world, server_of(**{OLD: lambda body: evil}))
    page = comparison_page([world.compare(server_of(**{NEW: right})), JobComparison("ftjob-x", None, remarks=["why"])])
    assert "The new model is better" in page and "ftjob-old1" in page and "why" in page
    assert evil not in page and "&lt;script&gt;" in page and "<script" not in page


def test_the_commands_record_and_compare(world, monkeypatch):
    export = world.folder / "jobs.json"
    export.write_text(json.dumps([exported(validation_file="file-valid")]))
    servers = {"https://old.example/v1": server_of(**{OLD: half_right}), "http://server/v1": server_of(**{NEW: right})}
    real = Endpoint
    monkeypatch.setattr(
        "ft_service.evaluate.ask.Endpoint", lambda url, key: real(url, key, servers[url].endpoint.transport)
    )
    monkeypatch.setattr(create, "FineTuningServer", lambda url, key: world.stand_in.connect(key))
    out = world.folder / "out"
    common = [str(export), "--files", str(world.folder / "files")]

    def ft(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["migrate", *arguments])
        assert done.exit_code == code, (done.output, done.exception)
        return done.stdout

    text = ft("record", *common, "--out", str(world.recorded), "--server", "https://old.example/v1", "--key", "k")
    assert f"{COUNT} answers" in text
    recorded_at = ["--recorded", str(world.recorded), "--out", str(out)]
    text = ft("compare", *common, *recorded_at, "--metric", "exact", "--key", "k")
    assert "better" in text and "comparison.html" in text
    assert "The new model is better" in (out / "comparison.html").read_text()
    (found,) = json.loads(ft("compare", *common, *recorded_at, "--metric", "exact", "--key", "k", "--json"))
    assert found["new_model"] == NEW and found["comparison"]["overall"]["verdict"] == "better"
    assert len(found["items"]) == COUNT
    world.stand_in.jobs.clear()
    assert "has no job on the server" in ft("compare", *common, *recorded_at, "--key", "k", code=1)
