"""Object stores of the tests: a folder that behaves like one, and an S3 server with faults on purpose."""

import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import obstore.store
import pytest

from ft_service.storage import object_store
from ft_service.storage.object_store import ObjectStore
from ft_service.storage.storage import Storage


class FolderAsObjectStore(Storage):
    """A folder through the code of object stores: no local paths, no renames, only the order of single changes."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._objects = FolderObjects(root)
        self._was_there = False  # it has no folders, so none can be gone


class FolderObjects(ObjectStore):
    def __init__(self, root: str) -> None:
        self.place = root
        self._store = obstore.store.LocalStore(root, mkdir=True, automatic_cleanup=True)


# -- an S3 server with faults ----------------------------------------------------------------------------------------

Answer = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Fault:
    """What happens to requests whose method and key match, until it is lifted."""

    def __init__(self, answer: Answer, methods: str, keys: str, once_each: bool, after: int) -> None:
        self.answer = answer
        self.hits = 0
        self._methods = methods
        self._keys = keys
        self._once_each = once_each
        self._after = after
        self._seen: set[str] = set()

    def applies(self, request: str) -> bool:
        method, _, path = request.partition(" ")
        if not re.fullmatch(self._methods, method) or not re.search(self._keys, path):
            return False
        if self._once_each and request in self._seen:
            return False
        self._seen.add(request)
        self._after -= 1
        if self._after >= 0:
            return False
        self.hits += 1
        return True


class FaultyS3:
    """An S3 server of this process. Faults are answered before the store sees the request."""

    def __init__(self, port: int, store: Answer) -> None:
        self.port = port
        self.requests: list[str] = []
        """Method, path and query of each."""
        self.store = store
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def root(self) -> str:
        """A storage root of its own."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.applies(request)), None)
        return (fault.answer if fault else self.store)(environ, start)

    @contextmanager
    def fault(
        self, answer: Answer, methods: str = ".*", keys: str = "", once_each: bool = False, after: int = 0
    ) -> Iterator[Fault]:
        """Within, requests that match are answered by `answer`, except the first `after` of them.

        With `once_each`, a request that is sent again reaches the store.
        """
        fault = Fault(answer, methods, keys, once_each, after)
        self._faults.append(fault)
        try:
            yield fault
        finally:
            self._faults.remove(fault)

    def losing_answers(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        """The store does what it is asked, and the connection breaks before its answer."""
        for _ in self.store(environ, lambda *_: lambda _: None):
            pass
        return _hang_up(environ, start)

    def unfinished_uploads(self) -> list[str]:
        import boto3

        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}")
        return [upload["Key"] for upload in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]


BUCKET = "ft-storage"


def refusal(status: str, code: str) -> Answer:
    """The store refuses with this status and error code."""

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>of the test</Message></Error>".encode()
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    return answer


SLOW_DOWN = refusal("503 Slow Down", "SlowDown")
INTERNAL_ERROR = refusal("500 Internal Server Error", "InternalError")
EXPIRED = refusal("400 Bad Request", "ExpiredToken")
DENIED = refusal("403 Forbidden", "AccessDenied")


def cut(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
    """The connection breaks when half of the request has arrived."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
    return _hang_up(environ, start)


def no_answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
    """Nothing comes until the client gives up."""
    connection = environ["werkzeug.socket"]
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    while connection.recv(4096):
        pass
    return _hang_up(environ, start)


def _hang_up(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
    with suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    start("200 OK", [])
    return [b""]


@contextmanager
def faulty_s3() -> Iterator[FaultyS3]:
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as those of a real store

        def log(self, *_: object) -> None:
            pass

    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, credentials):
        made: list[FaultyS3] = []
        server = make_server(
            "127.0.0.1", 0, lambda environ, start: made[0].answer(environ, start), threaded=True, request_handler=Silent
        )
        made.append(FaultyS3(server.server_port, DomainDispatcherApplication(create_backend_app)))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.server_port}").create_bucket(Bucket=BUCKET)
            yield made[0]
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def retry_quickly(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Short pauses between attempts of object stores, and local copies in a folder of the test's own."""
    pauses = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    monkeypatch.setattr(object_store, "_RETRIES", {**object_store._RETRIES, "backoff": pauses})
    monkeypatch.setattr("ft_service.storage.storage._DEFAULT_CACHE", cache)


def uploaded(s3: FaultyS3, folder: Path) -> str:
    """The URI of a copy of the folder's files."""
    root = s3.root()
    for file in folder.iterdir():
        Storage(root).write_bytes(file.name, file.read_bytes())
    return root
