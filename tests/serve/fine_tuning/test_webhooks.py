"""Webhooks as the stock client verifies them; bounded, whatever the receiver does; never to private addresses."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest

from serve.fine_tuning import webhooks
from serve.fine_tuning.job_records import utc_now
from serve.fine_tuning.webhooks import BACKOFF_SECONDS, Deliveries, ForbiddenAddressError, allowed_address, webhooks_of
from serve.settings import FineTuningSettings
from tests.serve.fine_tuning.job_world import World, make_world

SECRETS = ["whsec_c2VjcmV0IG9mIGEgdGVzdA==", "plain text"]


@pytest.fixture
def world(tmp_path) -> World:
    return make_world(tmp_path)


@contextmanager
def receiver(status: int = 200, **answer: str) -> Iterator[tuple[str, list[tuple[dict[str, str], str]]]]:
    """Its address, and what it has received."""
    received: list[tuple[dict[str, str], str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(status)
            for name, value in answer.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def settings(url: str, secret: str = SECRETS[0], **others: object) -> FineTuningSettings:
    return FineTuningSettings.model_validate({"webhooks": [{"url": url, "secret": secret}], **others})


def end(world: World, found: FineTuningSettings, state: str = "cancelled") -> str:
    job = world.job()
    now = world.clock()
    assert world.records.change(job, state, webhooks=webhooks_of(found, job, state, now)) is not None
    return job.id


@pytest.mark.parametrize("secret", SECRETS)
def test_the_stock_client_verifies_and_reads_a_webhook(world, secret):
    with receiver() as (url, received):
        found = settings(url, secret, private_webhooks=True)
        job_id = end(world, found)
        world.clock.now = utc_now()  # the client refuses old timestamps
        Deliveries(world.records, found).deliver()
        Deliveries(world.records, found).deliver()
    [(headers, body)] = received
    client = openai.OpenAI(api_key="x", webhook_secret=secret)
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id, event.object) == ("fine_tuning.job.cancelled", job_id, "event")
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(job_id, "ftjob-other"), headers)


def test_a_failing_receiver_is_called_with_pauses_and_then_no_more(world):
    with receiver(status=503) as (url, received):
        found = settings(url, private_webhooks=True)
        end(world, found)
        for wait in (*BACKOFF_SECONDS, 10**9):
            Deliveries(world.records, found).deliver()
            Deliveries(world.records, found).deliver()  # not due yet
            world.clock.forward(min(wait, 10**6) + 1)
        Deliveries(world.records, found).deliver()
    assert len(received) == len(BACKOFF_SECONDS) + 1
    assert len({headers["webhook-id"] for headers, _ in received}) == 1
    assert world.records.due_webhooks(10) == []


def test_a_silent_receiver_costs_a_bounded_time(world, monkeypatch):
    monkeypatch.setattr(webhooks, "CALL_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never answers
        found = settings(f"http://127.0.0.1:{listener.getsockname()[1]}/", private_webhooks=True)
        end(world, found)
        Deliveries(world.records, found).deliver()
    world.clock.forward(6)
    [row] = world.records.due_webhooks(10)
    assert row.attempts == 1 and row.outcome == "no answer within 0.2 s"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "::ffff:a9fe:a9fe",
        "::10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "fe80::1%eth0",
        "0.0.0.0",
        "224.0.0.1",
    ],
)
def test_a_name_with_a_private_address_is_refused(address):
    def lookup(host: str, port: int) -> list[str]:
        return ["93.184.216.34", address]

    with pytest.raises(ForbiddenAddressError, match="private_webhooks"):
        allowed_address("https://example.org/hook", False, lookup)
    assert allowed_address("https://example.org/hook", True, lookup) == "93.184.216.34"


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::93.184.216.34"])
def test_a_public_address_is_allowed(address):
    assert allowed_address("https://example.org/hook", False, lambda host, port: [address]) == address


def test_a_call_goes_to_the_address_that_was_judged_though_the_name_has_another_one_by_now(world):
    """A name server whose answers change cannot lead a call elsewhere: the name is looked up once for each call."""
    looked_up: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return ["127.0.0.1"] if len(looked_up) == 1 else ["192.0.2.1"]

    with receiver() as (url, received):
        found = settings(url.replace("127.0.0.1", "hooks.example.org"), private_webhooks=True)
        end(world, found)
        Deliveries(world.records, found, rebinding).deliver()
    [(headers, _)] = received
    assert looked_up == ["hooks.example.org"] and headers["host"].startswith("hooks.example.org:")


def test_a_redirect_is_not_followed(world):
    with receiver() as (elsewhere, received), receiver(307, location=elsewhere) as (url, redirected):
        found = settings(url, private_webhooks=True)
        end(world, found)
        Deliveries(world.records, found).deliver()
    world.clock.forward(6)
    [row] = world.records.due_webhooks(10)
    assert len(redirected) == 1 and received == [] and row.outcome == "HTTP 307"


def test_a_name_server_that_does_not_answer_costs_a_bounded_time(world, monkeypatch):
    monkeypatch.setattr(webhooks, "CALL_SECONDS", 0.2)
    answers = threading.Event()

    def silent(host: str, port: int) -> list[str]:
        answers.wait(60)
        return []

    found = settings("https://example.org/hook")
    end(world, found)
    try:
        Deliveries(world.records, found, silent).deliver()
        assert not answers.is_set()
    finally:
        answers.set()
    world.clock.forward(6)
    [row] = world.records.due_webhooks(10)
    assert row.outcome == "no answer within 0.2 s"


def test_a_dead_receiver_holds_up_no_other(world):
    with receiver() as (url, received), socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        listener.close()
        webhook = {"secret": SECRETS[0]}
        both = {"webhooks": [{"url": dead, **webhook}, {"url": url, **webhook}], "private_webhooks": True}
        found = FineTuningSettings.model_validate(both)
        end(world, found)
        Deliveries(world.records, found).deliver()
    world.clock.forward(6)
    [row] = world.records.due_webhooks(10)
    assert len(received) == 1 and row.url == dead and row.attempts == 1


def test_a_refused_address_is_never_called(world):
    with receiver() as (url, received):
        found = settings(url)
        end(world, found)
        Deliveries(world.records, found).deliver()
    world.clock.forward(6)
    [row] = world.records.due_webhooks(10)
    assert received == [] and "private address 127.0.0.1" in row.outcome


def test_only_the_ends_that_an_address_asks_for_are_reported(world):
    found = FineTuningSettings.model_validate(
        {"webhooks": [{"url": "https://example.org/", "secret": "s", "events": ["failed"]}]}
    )
    end(world, found)
    assert world.records.due_webhooks(10) == []


def test_a_webhook_needs_a_secret(monkeypatch):
    monkeypatch.delenv("FT_WEBHOOK_SECRET", raising=False)
    with pytest.raises(ValueError, match="FT_WEBHOOK_SECRET"):
        FineTuningSettings.model_validate({"webhooks": [{"url": "https://example.org/"}]})
