"""What people do whole: the script in README as it is printed there, the flows of OpenAI's cookbook with another
`base_url`, and `ft migrate` of a job of OpenAI."""

import csv
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from tests.migrate.openai_export import GPT, exported
from tests.serve.conformance.conformance_server import ConformanceServer, conformance_server

pytestmark = pytest.mark.multiprocess

README = Path(__file__).resolve().parents[3] / "README.md"
CHANGED = ('base_url="http://localhost:8000/v1", api_key="KEY"', 'MODEL = "llama-3.1-8b-instruct"')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConformanceServer]:
    with conformance_server(tmp_path_factory.mktemp("flows")) as found:
        yield found


def script() -> str:
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if "fine_tuning" in block)
    return found


def test_the_script_of_the_readme_runs_after_two_lines_were_changed(server: ConformanceServer) -> None:
    code = script()
    address, model = CHANGED
    assert [sum(line in one for one in code.splitlines()) for line in CHANGED] == [1, 1]
    code = code.replace(address, f"base_url={server.url!r}, api_key={server.key!r}")
    code = code.replace(model, f"MODEL = {server.model!r}")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=server.folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = ran.stdout.splitlines()
    assert lines[0] == "The job has successfully completed" and lines[-1] == "Hello"


# -- the cookbook: Chat_finetuning_data_prep, How_to_finetune_chat_models, Fine_tuning_for_function_calling ------------

ROLES = {"system", "user", "assistant", "function", "tool"}
KEYS = {"role", "content", "name", "function_call", "weight", "tool_calls", "tool_call_id"}


def cookbook_errors(dataset: list[Any]) -> Counter[str]:
    """The format check of Chat_finetuning_data_prep: its names of errors, by example and message."""
    errors: Counter[str] = Counter()
    for example in dataset:
        if not isinstance(example, dict):
            errors["data_type"] += 1
            continue
        messages = example.get("messages")
        if not messages:
            errors["missing_messages_list"] += 1
            continue
        for message in messages:
            if "role" not in message or "content" not in message:
                errors["message_missing_key"] += 1
            if any(key not in KEYS for key in message):
                errors["message_unrecognized_key"] += 1
            if message.get("role") not in ROLES:
                errors["unrecognized_role"] += 1
            if not isinstance(message.get("content"), str) and not message.get("function_call"):
                errors["missing_content"] += 1
        if not any(message.get("role") == "assistant" for message in messages):
            errors["example_missing_assistant_message"] += 1
    return errors


def client_of(server: ConformanceServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=server.key)


def upload(client: openai.OpenAI, path: Path) -> Any:
    made = client.files.create(file=path.open("rb"), purpose="fine-tune")
    return client.files.wait_for_processing(made.id, poll_interval=0.05)


def finished(server: ConformanceServer, job_id: str) -> Any:
    """The job once it has ended: then its stream of events ends."""
    address = f"{server.url}/fine_tuning/jobs/{job_id}/events?stream=true"
    headers = {"authorization": f"Bearer {server.key}"}
    assert httpx.get(address, headers=headers, timeout=120).text.rstrip().endswith("data: [DONE]")
    return client_of(server).fine_tuning.jobs.retrieve(job_id)


def test_the_data_check_of_the_cookbook_and_the_one_of_the_server_agree(
    server: ConformanceServer, tmp_path: Path
) -> None:
    good = [json.loads(line) for line in (server.folder / "train.jsonl").read_text().splitlines()]
    user = {"role": "user", "content": "Hi"}
    bad = [
        "no object",
        {"messages": []},
        {"messages": [user, {"role": "assistant", "content": "x", "mood": "good"}]},
        {"messages": [user, {"role": "robot", "content": "x"}, {"role": "assistant", "content": "x"}]},
        {"messages": [user]},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *bad]))
    client = client_of(server)
    checked = upload(client, path)
    assert checked.status == "error"
    found = checked.to_dict()["validation"]
    assert Counter(found["errors_by_code"]) == cookbook_errors([*good, *bad])
    listed = client.get(f"/files/{checked.id}/errors", cast_to=dict)["data"]
    assert {error["line"] for error in listed} == set(range(len(good) + 1, len(good) + len(bad) + 1))
    clean = upload(client, server.folder / "train.jsonl").to_dict()["validation"]
    assert cookbook_errors(good) == Counter() and clean["errors_by_code"] == {} and clean["examples"] == len(good)
    (counts,) = clean["token_counts"]
    assert 0 < counts["trained_tokens"] < counts["tokens"] and counts["longest_example"] < counts["tokens"]


def test_the_chat_flow_of_the_cookbook_ends_with_its_results_as_csv(server: ConformanceServer) -> None:
    client = client_of(server)
    training = upload(client, server.folder / "train.jsonl")
    validation = upload(client, server.folder / "valid.jsonl")
    job = client.fine_tuning.jobs.create(
        training_file=training.id, validation_file=validation.id, model=server.model, suffix="recipe-ner"
    )
    done = finished(server, job.id)
    assert done.status == "succeeded" and done.fine_tuned_model and done.trained_tokens
    messages = [
        event.message for event in client.fine_tuning.jobs.list_events(fine_tuning_job_id=job.id, limit=50).data
    ]
    assert messages[0] == "The job has successfully completed"
    answer = client.chat.completions.create(
        model=done.fine_tuned_model,
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        temperature=0,
        max_tokens=500,
    )
    assert answer.choices[0].message.content
    rows = list(csv.DictReader(io.StringIO(client.files.content(done.result_files[0]).text)))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > 1
    assert all(float(row["train_loss"]) > 0 and 0 <= float(row["train_accuracy"]) <= 1 for row in rows)
    assert float(rows[-1]["valid_loss"]) > 0 and 0 <= float(rows[-1]["valid_mean_token_accuracy"]) <= 1


def test_the_function_calling_flow_of_the_cookbook(server: ConformanceServer, tmp_path: Path) -> None:
    parameters = {"type": "object", "properties": {"angle": {"type": "integer"}}, "required": ["angle"]}
    tool: Any = {
        "type": "function",
        "function": {"name": "turn_camera", "description": "Turn", "parameters": parameters},
    }

    def row(angle: int) -> dict[str, Any]:
        arguments = json.dumps({"angle": angle})
        call = {"id": f"call_{angle}", "type": "function", "function": {"name": "turn_camera", "arguments": arguments}}
        return {
            "messages": [
                {"role": "system", "content": "You steer a drone."},
                {"role": "user", "content": f"Turn the camera by {angle} degrees, please"},
                {"role": "assistant", "tool_calls": [call]},
            ],
            "parallel_tool_calls": False,
            "tools": [tool],
        }

    path = tmp_path / "drone_training.jsonl"
    path.write_text("".join(json.dumps(row(angle)) + "\n" for angle in range(40)))
    client = client_of(server)
    file = upload(client, path)
    assert file.status == "processed", file.status_details
    job = client.fine_tuning.jobs.create(
        training_file=file.id,
        model=server.model,
        suffix="drone",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    )
    done = finished(server, job.id)
    assert done.status == "succeeded", done.error
    completion = client.chat.completions.create(
        model=done.fine_tuned_model,
        messages=[{"role": "user", "content": "Turn the camera by 3 degrees"}],
        temperature=0,
        tools=[tool],
        tool_choice="auto",
    )
    assert completion.model == done.fine_tuned_model and completion.choices[0].finish_reason


def test_a_job_of_openai_is_carried_over_once(
    server: ConformanceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FT_API_KEY", server.key)
    content = (server.folder / "train.jsonl").read_bytes()
    two_calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2}
    bad = json.dumps({"messages": [{"role": "user", "content": "twice"}, two_calls]})
    (tmp_path / "file-train.jsonl").write_bytes(content + bad.encode() + b"\n")
    (tmp_path / "jobs.json").write_text(json.dumps([exported()]))
    arguments = ["migrate", "openai", str(tmp_path / "jobs.json"), "--files", str(tmp_path), "--skip-bad-lines"]
    arguments += ["--map", f"{GPT}={server.model}", "--server", server.url, "--json"]
    outcomes = []
    for _ in range(2):
        ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
        (job,) = json.loads(ran.stdout)["jobs"]
        outcomes.append((job["outcome"], job["job"]))
    assert [outcome for outcome, _ in outcomes] == ["created", "exists"] and outcomes[0][1] == outcomes[1][1]
    client = openai.OpenAI(base_url=server.url, api_key=server.key)
    made = client.fine_tuning.jobs.retrieve(outcomes[0][1])
    assert made.metadata == {"team": "desk", "migrated_from": "ftjob-old1"} and made.seed == 42
    assert client.files.content(made.training_file).read() == content
    client.fine_tuning.jobs.cancel(made.id)
