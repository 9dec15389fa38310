"""`ft serve` is stopped by a signal while it answers. Real Ray Serve, an engine that waits to be released."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from ft_service.storage.storage import Storage
from tests.hosts import ROOT, wait_for
from tests.serve.scripted import DIE, HELD, hold, release
from tests.worlds import SMALL, write_base

pytestmark = pytest.mark.cluster

SECONDS = 90
TOKENS = 20
START = """
import sys
from functools import partial
from pathlib import Path

import serve.run
from serve.app import build_app
from tests.serve.scripted import CountingEngine

serve.run.build_app = partial(build_app, make_engine=CountingEngine)
serve.run.run_config(Path(sys.argv[1]))
"""


class Server:
    """`ft serve --config` in a session of its own, as in a terminal."""

    def __init__(self, folder: Path, base: Path, stop_seconds: float, stack: ExitStack) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        arguments = {
            "storage": str(folder),
            "bases": [{"base": str(base), "name": "tiny", "max_batch": 1, "cpus": 0, "gpus": 0}],
            "limits": {"stop_seconds": stop_seconds},
        }
        config = folder / "config.yaml"
        application = {"import_path": "serve.app:app", "args": arguments}
        config.write_text(yaml.safe_dump({"http_options": {"port": self.port}, "applications": [application]}))
        ray_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ft-", ignore_cleanup_errors=True))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder, "RAY_AUTH_MODE": "disabled"}
        for name in ("RAY_ADDRESS", "FT_API_KEY", "FT_DATABASE_URL"):
            environment.pop(name, None)
        self.log = folder / "server.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(config)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        stack.callback(self._kill)
        wait_for(lambda: "List them:" in self.printed(), 3 * SECONDS, self.process, self.log)

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def press_ctrl_c(self) -> None:
        """Every process of a terminal's foreground gets it, Ray's included."""
        os.killpg(self.process.pid, signal.SIGINT)

    def ask(self, kind: int = 5) -> httpx.Response:
        body = {"model": "tiny", "prompt": [kind, 1], "max_tokens": 1}
        return httpx.post(f"{self.url}/completions", json=body, timeout=SECONDS)

    def running(self) -> int:
        """Requests that its engine works on."""
        found: int = httpx.get(f"{self.url}/stats", timeout=SECONDS).json()["tiny"][0]["running"]
        return found

    def is_stopping(self) -> bool:
        return httpx.get(f"{self.url}/ready", timeout=SECONDS).status_code == 503

    def gateway(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(one for one in children if one.is_running() and "ServeReplica:ft:gateway" in "".join(one.cmdline()))

    def exit_code(self) -> int:
        return self.process.wait(SECONDS)

    def _kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Stream:
    """A streamed answer that is read in the background; held after its first token.

    `queued`: while another one is held, so that it waits in the gateway's queue.
    """

    def __init__(self, server: Server, threads: ThreadPoolExecutor, queued: bool) -> None:
        self._queued = queued
        self.events: list[str] = []
        self._url = f"{server.url}/completions"
        self._has_begun = threading.Event()
        self._end: Future[None] = threads.submit(self._read)
        assert self._has_begun.wait(SECONDS)

    def _read(self) -> None:
        body = {"model": "tiny", "prompt": [HELD, 1], "max_tokens": TOKENS, "stream": True}
        with httpx.stream("POST", self._url, json=body, timeout=SECONDS) as response:
            self._socket = response.extensions["network_stream"].get_extra_info("socket")
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))
                if self.events or self._queued:  # while it waits it gets comments
                    self._has_begun.set()

    def go_away(self) -> None:
        """As a client whose process ends."""
        self._socket.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        self._end.result(SECONDS)

    def is_complete(self) -> bool:
        self.wait()
        *events, done = self.events
        choices = [json.loads(event)["choices"][0] for event in events]
        text = "".join(choice["text"] for choice in choices)
        return done == "[DONE]" and choices[-1]["finish_reason"] == "length" and len(text.split()) == TOKENS

    def is_cut_off(self) -> bool:
        """Whether its connection broke, or the proxy had the time to say that its gateway is gone."""
        return isinstance(self._end.exception(SECONDS), httpx.TransportError) or self.error() == "gateway_died"

    def error(self) -> str | None:
        """The code of the error event that it ends in."""
        self.wait()
        error = json.loads(self.events[-1]).get("error") if self.events[-1] != "[DONE]" else None
        return error["code"] if error else None


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[[float], tuple[Server, Stream, Stream]]]:
    """Starts a server with that many `stop_seconds`, a stream that has begun, and one that waits in the queue."""
    base = tmp_path / "tiny"
    write_base(base, ["the quick brown fox"], 280, SMALL)
    hold(base)
    storage = tmp_path / "storage"
    Path(Storage(str(storage)).root).mkdir()
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(4))
        stack.callback(release, base)

        def start_one(stop_seconds: float) -> tuple[Server, Stream, Stream]:
            server = Server(storage, base, stop_seconds, stack)
            return server, Stream(server, threads, queued=False), Stream(server, threads, queued=True)

        yield start_one


def test_streams_in_flight_end_whole_while_new_requests_are_refused(start, tmp_path):
    server, begun, queued = start(600)
    server.terminate()
    wait_for(server.is_stopping, SECONDS)
    refused = server.ask()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_stopping")
    assert int(refused.headers["retry-after"]) > 0
    assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
    assert server.process.poll() is None and begun.events and not queued.events
    release(tmp_path / "tiny")
    assert begun.is_complete() and queued.is_complete()
    assert server.exit_code() == 0


def test_streams_that_take_longer_than_allowed_are_cut_with_an_error(start):
    server, begun, queued = start(0.5)
    server.press_ctrl_c()
    for stream in (begun, queued):
        assert stream.error() == "server_stopping"
    assert server.exit_code() == 0


def test_a_second_signal_stops_at_once(start):
    server, begun, _ = start(600)
    server.terminate()
    wait_for(server.is_stopping, SECONDS)
    server.terminate()
    assert server.exit_code() == 0
    assert begun.is_cut_off() and "[DONE]" not in begun.events
    assert "Stopping at once." in server.printed()


def test_gateways_and_replicas_that_die_end_their_answers_with_an_error_and_are_replaced(start, tmp_path):
    server, begun, queued = start(0)
    server.gateway().kill()
    assert (begun.error(), queued.error()) == ("gateway_died", "gateway_died")
    release(tmp_path / "tiny")
    assert server.ask().status_code == 200
    assert len(httpx.get(f"{server.url}/stats", timeout=SECONDS).json()["tiny"]) == 1
    died = server.ask(DIE)  # with the settings of `ft serve`; the tests of a shared cluster have Ray's own
    assert died.status_code == 500 and "has died" in died.json()["error"]["message"]
    assert server.ask().status_code == 200


def test_clients_that_go_away_free_their_places(start):
    """Also here with the settings of `ft serve`: a gateway does not ask the proxy whether a client has gone."""
    server, begun, queued = start(0)
    begun.go_away()
    wait_for(lambda: queued.events, SECONDS)
    queued.go_away()
    wait_for(lambda: server.running() == 0, SECONDS)
    whole = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"model": "tiny", "prompt": [HELD, 1], "max_tokens": TOKENS}
    whole.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    wait_for(lambda: server.running() == 1, SECONDS)
    whole.close()
    wait_for(lambda: server.running() == 0, SECONDS)
