"""`ft migrate openai`: an export and its files become jobs of a server, and what cannot be carried over is reported."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.fine_tuning import FineTuningJob
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import ServingError, UsageError
from ft_service.migrate import create
from ft_service.migrate.create import create_jobs
from ft_service.migrate.exported import ExportedJob, read_jobs
from ft_service.migrate.mapping import Mapping, read_mapping
from ft_service.migrate.migration import MigrationJob, plan_migration
from ft_service.migrate.rows import read_rows
from tests.migrate.openai_export import GPT, exported
from tests.migrate.openai_stand_in import StandIn, error

LLAMA = "llama-3.1-8b-instruct"
MAPPING = Mapping(models={GPT: LLAMA})
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
WEIGHTED = {
    "messages": [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "weight": 0},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two", "weight": 1},
    ]
}
FUNCTION = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a cat"},
        {"role": "assistant", "content": "A cat."},
    ],
    "tools": [FUNCTION],
    "parallel_tool_calls": False,
}
TWO_CALLS = {
    "messages": [{"role": "user", "content": "Look twice"}, {"role": "assistant", "tool_calls": [CALL, CALL]}],
    "tools": [FUNCTION],
}
IMAGE = {
    "messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}]},
        {"role": "assistant", "content": "A cat."},
    ]
}
PREFERENCE = {
    "input": {"messages": [{"role": "user", "content": "Hi"}]},
    "preferred_output": [{"role": "assistant", "content": "Hello"}],
    "non_preferred_output": [{"role": "assistant", "content": "What?"}],
}


def write_rows(file: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(line + "\n" for line in lines))
    return file


def write_export(file: Path, *jobs: dict[str, Any]) -> Path:
    file.write_text(json.dumps(jobs))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "file-train.jsonl", GOOD, WEIGHTED, WITH_TOOLS)
    return tmp_path


def planned(folder: Path, *changes: dict[str, Any], **options: Any) -> list[MigrationJob]:
    jobs = [ExportedJob.model_validate(exported(**one)) for one in changes or ({},)]
    return plan_migration(jobs, options.pop("mapping", MAPPING), folder, **options)


# -- the export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([exported(), exported(id="ftjob-old2")]),
        json.dumps({"object": "list", "data": [exported(), exported(id="ftjob-old2")], "has_more": False}),
        json.dumps(exported()) + "\n\n" + json.dumps(exported(id="ftjob-old2")) + "\n",
        "\ufeff" + json.dumps([exported(), exported(id="ftjob-old2")]),
    ],
    ids=["array", "page", "lines", "byte order mark"],
)
def test_an_export_is_an_array_a_page_or_json_lines(tmp_path, text):
    file = tmp_path / "jobs.json"
    file.write_text(text)
    assert [job.id for job in read_jobs(file)] == ["ftjob-old1", "ftjob-old2"]


def test_what_the_installed_client_returns_can_be_exported(tmp_path):
    job = FineTuningJob.model_validate(exported())
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps([job.to_dict()]))
    (read,) = read_jobs(file)
    assert (read.id, read.suffix, read.settings.n_epochs) == ("ftjob-old1", "desk", 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "entry 1 is no fine-tuning job"),
        ('[{"id": "ftjob-1"}]', "entry 1 is no fine-tuning job (model: Field required)"),
        ('{"id": 1}\nno', "line 2 is not JSON"),
    ],
)
def test_what_is_no_export_is_refused_with_its_place(tmp_path, text, reason):
    file = tmp_path / "jobs.json"
    file.write_text(text if text.startswith("[") else text.replace('{"id": 1}', json.dumps(exported())))
    with pytest.raises(UsageError) as refused:
        read_jobs(file)
    assert reason in str(refused.value)


def test_hyperparameters_at_the_top_of_older_jobs_are_read():
    job = ExportedJob.model_validate(exported(method=None, hyperparameters={"n_epochs": 4}))
    assert job.settings.n_epochs == 4 and job.settings.batch_size is None


# -- the mapping -----------------------------------------------------------------------------------------------------


def test_options_win_over_the_mapping_file_and_longer_beginnings_over_shorter(tmp_path):
    file = tmp_path / "mapping.yaml"
    file.write_text("models: {gpt-*: small, gpt-4o*: large, other: none}\nfiles: {file-a: data/a.jsonl}\n")
    mapping = read_mapping(file, ["other=llama"])
    names = ("gpt-4o-mini", "gpt-3.5", "other", "davinci")
    assert [mapping.model(name) for name in names] == ["large", "small", "llama", None]
    assert mapping.files == {"file-a": tmp_path / "data/a.jsonl"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [("modells: {}", "modells: Extra inputs"), ("hyperparameters: {n_epochs: 99}", "n_epochs"), (":", "")],
)
def test_a_wrong_mapping_file_is_refused(tmp_path, content, reason):
    file = tmp_path / "mapping.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as refused:
        read_mapping(file, [])
    assert reason in str(refused.value) and str(file) in str(refused.value)


def test_a_map_option_is_a_pair():
    with pytest.raises(UsageError, match="--map = 'gpt-4o'"):
        read_mapping(None, ["gpt-4o"])


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_with_tools_and_weights_are_counted(folder):
    report = read_rows(folder / "file-train.jsonl")
    assert (report.rows, report.usable, report.with_tools, report.with_weights) == (3, 3, 1, 1)
    assert report.ignored_fields == {"parallel_tool_calls"}


def test_each_bad_row_is_reported_by_its_line_and_reason(tmp_path):
    file = write_rows(
        tmp_path / "rows.jsonl",
        GOOD,
        TWO_CALLS,
        "",
        IMAGE,
        PREFERENCE,
        {"prompt": "a", "completion": "b"},
        "{",
        [1],
        {"messages": GOOD["messages"][:1]},
        {**GOOD, "functions": [FUNCTION["function"]]},
    )
    report = read_rows(file)
    assert report.rows == 9 and report.usable == 1 and report.preference_rows == 1
    assert [bad.line for bad in report.bad_lines] == [2, 4, 5, 6, 7, 8, 9, 10]
    reasons = [bad.reason for bad in report.bad_lines]
    for reason, part in zip(
        reasons,
        (
            "calls 2 functions",
            "image",
            "DPO",
            "prompt and completion",
            "not JSON",
            "no JSON object",
            "no assistant",
            "`functions`",
        ),
        strict=True,
    ):
        assert part in reason.replace("not a JSON", "no JSON")


# -- what becomes of a job -------------------------------------------------------------------------------------------


def test_a_job_becomes_the_request_that_creates_it_again(folder):
    integration = {"type": "wandb", "wandb": {"project": "desk", "name": None, "entity": None, "tags": ["a"]}}
    (job,) = planned(folder, {"integrations": [integration]})
    assert (job.outcome, job.problems) == ("ready", [])
    assert job.request == {
        "model": LLAMA,
        "suffix": "desk",
        "seed": 42,
        "metadata": {"team": "desk", "migrated_from": "ftjob-old1"},
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8}},
        },
        "integrations": [{"type": "wandb", "wandb": {"project": "desk", "tags": ["a"]}}],
    }
    assert any("learning_rate_multiplier 1.8 multiplies" in note for note in job.notes)
    assert any("ignores parallel_tool_calls" in note for note in job.notes)


def test_the_mapping_replaces_hyperparameters_of_every_job(folder):
    mapping = Mapping.model_validate({"models": {GPT: LLAMA}, "hyperparameters": {"learning_rate_multiplier": "auto"}})
    (job,) = planned(folder, mapping=mapping)
    assert job.request["method"]["supervised"]["hyperparameters"]["learning_rate_multiplier"] == "auto"
    assert any("auto instead of 1.8" in note for note in job.notes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": "gpt-4.1"}, "--map gpt-4.1=MODEL"),
        ({"model": "ft:x:o::1"}, "continues a fine-tuned model"),
        ({"training_file": "file-gone"}, "client.files.content('file-gone')"),
        ({"validation_file": "file-gone"}, "validation_file = 'file-gone'"),
        ({"method": {"type": "dpo", "dpo": {}}}, "only supervised jobs"),
        ({"method": {"type": "reinforcement"}}, "only supervised jobs"),
        ({"metadata": {str(number): "x" for number in range(16)}}, "has 16 entries"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_with_its_reason(folder, changes, part):
    (job,) = planned(folder, changes)
    assert job.outcome == "refused" and any(part in problem for problem in job.problems)


def test_a_job_on_the_model_of_another_names_that_job(folder):
    second = {"id": "ftjob-old2", "model": exported()["fine_tuned_model"], "fine_tuned_model": None}
    jobs = planned(folder, second, {})
    assert [job.source.id for job in jobs] == ["ftjob-old1", "ftjob-old2"]
    assert "the model of ftjob-old1" in jobs[1].problems[0]


def test_jobs_that_did_not_succeed_are_skipped_unless_named(folder):
    jobs = planned(folder, {}, {"id": "ftjob-old2", "status": "failed", "fine_tuned_model": None})
    assert [job.outcome for job in jobs] == ["skipped", "ready"]
    (named,) = planned(folder, {}, {"id": "ftjob-old2", "status": "failed"}, only=["ftjob-old2"])
    assert named.outcome == "ready"
    with pytest.raises(UsageError, match="--job = 'other'"):
        planned(folder, only=["other"])


def test_bad_lines_refuse_a_job_unless_they_are_left_out(folder):
    write_rows(folder / "file-train.jsonl", GOOD, TWO_CALLS)
    (job,) = planned(folder)
    assert job.outcome == "refused" and "line 2 message 2 calls 2 functions" in job.problems[0]
    (job,) = planned(folder, skip_bad_lines=True)
    assert job.outcome == "ready" and "They are left out" in " ".join(job.notes)


def test_a_file_of_preference_rows_is_reported_as_not_carried_over_yet(folder):
    write_rows(folder / "file-train.jsonl", PREFERENCE)
    (job,) = planned(folder, skip_bad_lines=True)
    assert job.outcome == "refused" and "all rows are preference rows (DPO)" in job.problems[0]


# -- on a server -----------------------------------------------------------------------------------------------------


def test_jobs_are_created_and_a_second_run_creates_nothing_more(folder):
    server = StandIn()
    jobs = planned(folder, {"id": "ftjob-old2"}, {})
    create_jobs(server.connect(), jobs)
    assert [(job.outcome, job.job_id) for job in jobs] == [("created", "ftjob-new1"), ("created", "ftjob-new2")]
    assert len(server.files) == 1  # both use the same file
    assert [job["training_file"] for job in server.jobs] == ["file-1", "file-1"]
    content = server.files["file-1"]
    assert b'name="purpose"\r\n\r\nfine-tune' in content
    assert (folder / "file-train.jsonl").read_bytes() in content
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer secret"}
    again = planned(folder, {"id": "ftjob-old2"}, {})
    create_jobs(server.connect(), again)
    assert [job.outcome for job in again] == ["exists", "exists"] and len(server.jobs) == 2


def test_bad_lines_are_not_uploaded(folder):
    write_rows(folder / "file-train.jsonl", GOOD, TWO_CALLS, WEIGHTED)
    server = StandIn()
    create_jobs(server.connect(), planned(folder, skip_bad_lines=True))
    assert (json.dumps(GOOD) + "\n" + json.dumps(WEIGHTED) + "\n").encode() in server.files["file-1"]
    assert b"Look twice" not in server.files["file-1"]


def test_a_job_that_failed_on_the_server_is_created_again(folder):
    server = StandIn()
    create_jobs(server.connect(), planned(folder))
    server.jobs[0]["status"] = "failed"
    create_jobs(server.connect(), planned(folder))
    assert len(server.jobs) == 2


def test_a_busy_server_is_asked_again_with_the_whole_file(folder):
    def busy_twice(request: httpx.Request, number: int) -> httpx.Response | Exception | None:
        if number == 2:
            return error(503, "busy", **{"retry-after": "7"})
        return httpx.ConnectError("gone") if number == 3 else None

    server = StandIn(fault=busy_twice)
    jobs = planned(folder)
    create_jobs(server.connect(), jobs)
    assert jobs[0].outcome == "created" and server.waits == [7.0, 2.0]
    assert (folder / "file-train.jsonl").read_bytes() in server.files["file-1"]


def test_what_the_server_refuses_fails_that_job_alone(folder):
    def refuse_first(request: httpx.Request, number: int) -> httpx.Response | None:
        is_create = request.method == "POST" and request.url.path.endswith("/jobs")
        return error(400, "suffix: is too long.") if is_create and number == 3 else None

    server = StandIn(fault=refuse_first)
    jobs = planned(folder, {"id": "ftjob-old2"}, {})
    create_jobs(server.connect(), jobs)
    assert [job.outcome for job in jobs] == ["failed", "created"]
    assert jobs[0].problems == ["the server refuses it (400): suffix: is too long."]


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (error(401, "Incorrect API key."), "FT_API_KEY"),
        (httpx.ConnectError("no"), "does not answer (ConnectError)"),
        (httpx.Response(200, text="<html>"), "no JSON object"),
    ],
)
def test_a_server_that_answers_nobody_ends_the_migration(folder, fault, part):
    server = StandIn(fault=lambda request, number: fault)
    with pytest.raises(ServingError) as failed:
        create_jobs(server.connect(None), planned(folder))
    assert part in str(failed.value) and type(failed.value) is ServingError


def test_a_server_that_forbids_a_retry_is_not_asked_again(folder):
    server = StandIn(fault=lambda request, number: error(500, "broken", **{"x-should-retry": "false"}))
    jobs = planned(folder)
    create_jobs(server.connect(), jobs)
    assert jobs[0].outcome == "failed" and len(server.requests) == 1 and server.waits == []


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_dry_run_asks_no_server_and_reports_everything(folder, monkeypatch):
    monkeypatch.setattr(create, "FineTuningServer", None)  # would raise
    write_rows(folder / "bad.jsonl", GOOD, TWO_CALLS)
    export = write_export(
        folder / "jobs.json",
        exported(id="ftjob-old3", status="cancelled"),
        exported(id="ftjob-old2", training_file="bad"),
        exported(),
    )
    arguments = ["migrate", "openai", str(export), "--files", str(folder), "--map", f"{GPT}={LLAMA}", "--dry-run"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 1
    for part in (
        f"ftjob-old1  {GPT} -> {LLAMA}  ready",
        "3 rows, 1 with tools, 1 with weights",
        "ftjob-old2",
        "line 2 message 2 calls 2 functions",
        "was cancelled at OpenAI",
        "OpenAI does not give them out",
        "1 ready, 1 skipped, 1 refused",
        "no server was asked",
    ):
        assert part in ran.output
    ran = CliRunner().invoke(app, [*arguments, "--json"])
    report = json.loads(ran.stdout)
    assert [job["outcome"] for job in report["jobs"]] == ["ready", "refused", "skipped"]
    assert report["jobs"][1]["files"]["training_file"]["bad_lines"][0]["line"] == 2


def test_the_command_creates_the_jobs_on_the_server(folder, monkeypatch):
    server = StandIn()
    asked = []

    def connect(url: str, key: str | None) -> create.FineTuningServer:
        asked.append((url, key))
        return server.connect(key)

    monkeypatch.setattr(create, "FineTuningServer", connect)
    export = write_export(folder / "jobs.json", exported())
    arguments = ["migrate", "openai", str(export), "--files", str(folder), "--map", f"{GPT}={LLAMA}"]
    ran = CliRunner().invoke(app, [*arguments, "--server", "http://there"], env={"FT_API_KEY": "k"})
    assert ran.exit_code == 0 and "job ftjob-new1" in ran.output and "1 created" in ran.output
    assert asked == [("http://there", "k")]
