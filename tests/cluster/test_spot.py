"""A cloud's notice reaches Ray as a drain: metadata servers as the clouds document them, and a cluster's node."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ft_service.cluster import spot


class Metadata(BaseHTTPRequestHandler):
    """EC2's server (version 2: nothing without a token) and Compute Engine's (nothing without the header)."""

    preempted = False

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        good = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "60"
        self.answer(200, "TOKEN") if good else self.answer(400, "")

    def do_GET(self) -> None:
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "TOKEN":
                self.answer(401, "")
            elif self.preempted:
                self.answer(200, '{"action": "terminate", "time": "2026-11-28T08:22:00Z"}')
            else:
                self.answer(404, "")
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            self.answer(200, "TRUE" if self.preempted else "FALSE")
        else:
            self.answer(403, "")


@contextmanager
def metadata_server(preempted: bool) -> Iterator[str]:
    handler = type("Handler", (Metadata,), {"preempted": preempted})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 110), ("gcp", 25)])
def test_a_notice_is_read_as_the_cloud_gives_it(cloud: str, seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # would refuse
    with metadata_server(preempted=False) as server:
        assert spot.NOTICES[cloud](server) is None
    with metadata_server(preempted=True) as server:
        notice = spot.NOTICES[cloud](server)
    assert notice is not None and notice.seconds_left == seconds


def test_a_silent_metadata_server_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([OSError("timed out"), None, spot.Notice(110, "spot")])
    drained: list[spot.Notice] = []
    pauses: list[None] = []

    def notice() -> spot.Notice | None:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    spot.watch(notice, drained.append, lambda: pauses.append(None))
    assert drained == [spot.Notice(110, "spot")] and len(pauses) == 2
    assert "does not answer: timed out" in capsys.readouterr().out
