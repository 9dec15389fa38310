"""Files over HTTP: kept whole or not at all, shared by their content, seen by their tenants, deleted for good."""

import errno
import hashlib
import http.client
import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pytest
from sqlalchemy import update

from ft_service.errors import UnreachableError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.database import database
from serve.database.audit import audit_log
from serve.database.database import session
from serve.database.tables import FileRow, UploadRow
from serve.fine_tuning import file_checks, file_routes, multipart
from serve.fine_tuning.file_keeper import FileKeeper
from serve.fine_tuning.file_records import FileRecords, NewFile
from serve.fine_tuning.files import INCOMING
from serve.fine_tuning.paging import new_id
from serve.http.errors import ApiError
from serve.http.tenants import Tenant
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import BaseSettings, FileSettings, ServeSettings
from tests.browser import served
from tests.serve.fine_tuning.file_world import EXAMPLE, ROOT_KEY, TRAINING, FileServer, file_server, jsonl, send
from tests.serve.fine_tuning.file_world import write_tiny_base as write_base
from tests.serve.test_health import Idle

MIB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    with file_server(base, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: FileServer, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """With a key of this test alone."""
    with server.client(request.node.name) as opened:
        yield opened


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def keeper_of(server: FileServer) -> FileKeeper:
    return FileKeeper(server.engine(), Storage(str(server.storage)), FileSettings(), {})


# -- one file ----------------------------------------------------------------------------------------------------------


def test_a_training_file_is_checked_and_its_tokens_are_counted(client):
    file = send(client).json()
    assert file["id"].startswith("file-") and len(file["id"]) == 29
    validation = file.pop("validation")
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(TRAINING),
        "created_at": file["created_at"],
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }
    (counts,) = validation.pop("token_counts")
    assert validation == {"examples": 10, "valid_examples": 10, "errors": 0, "errors_by_code": {}}
    assert counts["bases"] == ["tiny"] and counts["tokens"] > counts["trained_tokens"] > 0
    assert client.get(f"/files/{file['id']}").json()["validation"]["token_counts"] == [counts]


def test_a_wrong_file_says_why_and_lists_every_error(client):
    wrong = {"messages": [{"role": "boss", "content": "x"}]}
    file = send(client, jsonl(*[EXAMPLE] * 10, wrong, wrong)).json()
    assert file["status"] == "error"
    assert file["status_details"].startswith("4 errors. line 11, messages[0].role: messages[0] has the role 'boss'")
    assert file["validation"]["errors_by_code"] == {"unrecognized_role": 2, "example_missing_assistant_message": 2}
    first = client.get(f"/files/{file['id']}/errors", params={"limit": 3}).json()
    assert [(one["line"], one["field"], one["code"]) for one in first["data"]] == [
        (11, "messages[0].role", "unrecognized_role"),
        (11, "messages", "example_missing_assistant_message"),
        (12, "messages[0].role", "unrecognized_role"),
    ]
    rest = client.get(f"/files/{file['id']}/errors", params={"after": first["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == ["4"] and (first["has_more"], rest["has_more"]) == (True, False)


@pytest.mark.parametrize("purpose", ["assistants", "batch", "vision", "user_data", "evals"])
def test_files_for_other_purposes_are_kept_unread(client, purpose):
    file = send(client, b"\0any bytes", purpose=purpose).json()
    assert (file["status"], file["validation"], file["purpose"]) == ("processed", None, purpose)


def test_content_comes_back_as_it_was_sent_block_by_block(client):
    content = bytes(range(256)) * 4096 * 3 + b"end"
    file = send(client, content, 'データ "1".bin', purpose="user_data").json()
    assert file["filename"] == 'データ "1".bin'
    response = client.get(f"/files/{file['id']}/content")
    assert response.content == content
    assert response.headers["content-length"] == str(len(content))
    assert response.headers["content-disposition"].startswith("attachment; filename*=UTF-8''%E3%83%87")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\train.jsonl", "train.jsonl"),
        ("😀.jsonl", "😀.jsonl"),
        ("x" * 400, "x" * 255),
        ("..", ".."),
    ],
)
def test_a_filename_is_only_a_name(client, server, name, kept):
    assert send(client, name=name, purpose="user_data").json()["filename"] == kept
    assert set(server.on_storage()) <= {"content", "errors"}


def test_control_characters_of_a_filename_are_left_out():
    assert multipart.clean_filename("a\tb\0\r\n.jsonl\u202e") == "ab.jsonl"
    assert multipart.clean_filename("folder/") == "file"


def test_parts_of_a_form_may_come_in_any_order(client):
    content = b"--not a boundary\r\n" * 5
    boundary = "b0undary"
    parts = [
        b'Content-Disposition: form-data; name="file"; filename="a.bin"\r\nContent-Type: text/plain\r\n\r\n' + content,
        b'Content-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n3600',
        b'content-disposition: form-data; name="purpose"\r\n\r\nuser_data',
        b'Content-Disposition: form-data; name="expires_after[anchor]"\r\n\r\ncreated_at',
    ]
    for order in (parts, parts[::-1]):
        body = b"".join(b"--b0undary\r\n" + part + b"\r\n" for part in order) + b"--b0undary--\r\n"
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        file = client.post("/files", content=body, headers=headers).json()
        assert (file["bytes"], file["expires_at"] - file["created_at"]) == (len(content), 3600)
        assert client.get(f"/files/{file['id']}/content").content == content


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"purpose": "nonsense"}, "invalid_value", "purpose"),
        ({"purpose": "assistants_output"}, "invalid_value", "purpose"),
        ({"colour": "red"}, "unknown_parameter", "colour"),
        ({"expires_after[anchor]": "created_at"}, "invalid_value", "expires_after"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "invalid_value", "expires_after"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "10"}, "invalid_value", "expires_after"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"},
            "invalid_value",
            "expires_after",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name_and_leave_nothing(client, server, fields, code, param):
    before = server.on_storage()
    response = client.post("/files", files={"file": b"x"}, data={"purpose": "user_data", **fields})
    assert error(response) == (400, code)
    assert response.json()["error"]["param"] == param
    assert server.on_storage() == before and client.get("/files").json()["data"] == []


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("application/json", b"{}", 415, "unsupported_media_type"),
        ("multipart/form-data", b"", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=" + "b" * 500, b"", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=b", b"nonsense", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=b", b"", 400, "incomplete_body"),
        ("multipart/form-data; boundary=b", b"--b\r\nX: y\r\n\r\nz\r\n--b--\r\n", 400, "invalid_multipart"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf',
            400,
            "incomplete_body",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n',
            400,
            "missing_required_parameter",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--\r\n',
            400,
            "missing_required_parameter",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n' * 2 + b"--b--\r\n",
            400,
            "invalid_value",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n\r\n--b--\r\n',
            400,
            "empty_file",
        ),
    ],
)
def test_a_body_that_is_no_form_is_refused_and_leaves_nothing(client, server, content_type, body, status, code):
    before = server.on_storage()
    response = client.post("/files", content=body, headers={"content-type": content_type})
    assert error(response) == (status, code)
    assert server.on_storage() == before


def test_a_body_cut_in_the_middle_leaves_nothing(server, client):
    before = server.on_storage()
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with socket.create_connection((host, int(port))) as cut:
        request = (
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: {client.headers['authorization']}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 3000000\r\n\r\n"
        )
        cut.sendall(request.encode() + head + b"x" * 2 * MIB)
        wait_until(lambda: "incoming" in server.on_storage())
    wait_until(lambda: server.on_storage() == before)
    assert client.get("/files").json()["data"] == []


def wait_until(condition: Any) -> None:
    """For up to ten seconds, in which the server does other requests."""
    deadline = datetime.now(UTC) + timedelta(seconds=10)
    while not condition():
        assert datetime.now(UTC) < deadline


# -- limits ------------------------------------------------------------------------------------------------------------


def test_five_gigabytes_are_refused_before_they_are_sent(server, client):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://").removesuffix("/v1"))
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Authorization", client.headers["authorization"])
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", str(5 * 2**30))
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "file_too_large"
    connection.close()


def test_a_file_without_a_declared_length_is_refused_once_it_is_too_long(server, client):
    before = server.on_storage()

    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(6):
            yield b"x" * MIB

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert error(client.post("/files", content=body(), headers=headers)) == (413, "file_too_large")
    wait_until(lambda: server.on_storage() == before)


def test_a_key_has_a_quota_of_bytes_and_deleting_gives_it_back(client):
    content = b"x" * (4 * MIB - 10)
    files = [send(client, content, purpose="user_data").json()["id"] for _ in range(5)]
    response = send(client, content, purpose="user_data")
    assert error(response) == (403, "storage_quota_exceeded")
    assert error(client.post("/uploads", json=upload_of(MIB))) == (403, "storage_quota_exceeded")
    client.delete(f"/files/{files[0]}")
    assert send(client, content, purpose="user_data").is_success


def test_a_quota_holds_for_all_gateways_together(server):
    """Files and uploads that come to two gateways at the same moment."""
    owner = Tenant("key-of-this-test", "anna", None, sees_all=False)
    gateways = [FileRecords(server.engine(), 100) for _ in range(2)]
    barrier = threading.Barrier(24)
    published: list[str] = []

    def add(number: int) -> bool:
        records = gateways[number % 2]
        file_id = new_id("file-")
        barrier.wait(60)
        try:
            if number % 4 < 2:
                new = NewFile(file_id, owner, "a", "user_data", f"digest of {number}", 20)
                records.add(new, lambda: published.append(file_id))
            else:
                records.add_upload(new_id("upload_"), owner, "a", "user_data", 20, 60.0, None)
        except ApiError as error:
            assert (error.status, error.code) == (403, "storage_quota_exceeded")
            return False
        return True

    with ThreadPoolExecutor(24) as pool:
        accepted = sum(pool.map(add, range(24)))
    files, _ = gateways[0].list_files(owner, None, None, 100, "asc")
    assert accepted == 5 and sorted(published) == [file.id for file in files]
    for file in files:
        gateways[0].delete(owner, file.id, lambda digest: None)


def test_too_many_bodies_at_once_get_429(client, monkeypatch):
    monkeypatch.setattr(file_routes, "MOST_ARRIVING", 0)
    response = send(client)
    assert error(response) == (429, "overloaded") and response.headers["retry-after"] == "2"


def test_a_client_that_sends_nothing_gets_408(server, client, monkeypatch):
    monkeypatch.setattr(multipart, "IDLE_SECONDS", 0.05)
    before = server.on_storage()
    connection = http.client.HTTPConnection(server.url.removeprefix("http://").removesuffix("/v1"))
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Authorization", client.headers["authorization"])
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    assert connection.getresponse().status == 408
    connection.close()
    assert server.on_storage() == before


# -- lists -------------------------------------------------------------------------------------------------------------


def test_pages_go_through_all_files_even_if_each_is_deleted_meanwhile(client):
    made = [send(client, f"{number}".encode(), purpose="user_data").json()["id"] for number in range(7)]
    send(client, purpose="fine-tune")
    seen: list[str] = []
    page = client.get("/files", params={"purpose": "user_data", "limit": 3, "order": "asc"}).json()
    while True:
        assert [page["first_id"], page["last_id"]] == [page["data"][0]["id"], page["data"][-1]["id"]]
        for file in page["data"]:
            seen.append(file["id"])
            client.delete(f"/files/{file['id']}")
        if not page["has_more"]:
            break
        params = {"purpose": "user_data", "limit": 3, "order": "asc", "after": page["last_id"]}
        page = client.get("/files", params=params).json()
    assert seen == made
    assert [file["purpose"] for file in client.get("/files").json()["data"]] == ["fine-tune"]


def test_the_newest_file_is_first_unless_asked_otherwise(client):
    made = [send(client, purpose="user_data").json()["id"] for _ in range(3)]
    assert [file["id"] for file in client.get("/files").json()["data"]] == made[::-1]
    assert client.get("/files", params={"purpose": "nonsense\0"}).json()["data"] == []


@pytest.mark.parametrize(
    "params", [{"limit": 0}, {"limit": 10_001}, {"limit": "x"}, {"order": "up"}, {"after": "file-x"}, {"after": "\0"}]
)
def test_wrong_parameters_of_a_list_are_refused_by_name(client, params):
    response = client.get("/files", params=params)
    assert error(response) == (400, "invalid_value")
    assert response.json()["error"]["param"] == next(iter(params))


# -- tenants and deletion ----------------------------------------------------------------------------------------------


def test_a_key_sees_its_own_files_and_those_of_its_organisation(server):
    with (
        server.client("ann", "acme") as ann,
        server.client("bob", "acme") as bob,
        server.client("eve", "other") as eve,
        server.client("joe") as joe,
        server.client("root", is_admin=True) as admin,
        server.with_key(ROOT_KEY) as root,
    ):
        file = send(ann).json()["id"]
        for one in (ann, bob, admin, root):
            assert one.get(f"/files/{file}").is_success
            assert file in [found["id"] for found in one.get("/files").json()["data"]]
        for one in (eve, joe):
            for path in ("", "/content", "/errors"):
                assert error(one.get(f"/files/{file}{path}")) == (404, "file_not_found")
            assert error(one.delete(f"/files/{file}")) == (404, "file_not_found")
            assert one.get("/files").json()["data"] == []
        assert bob.delete(f"/files/{file}").json() == {"id": file, "object": "file", "deleted": True}
        assert error(ann.get(f"/files/{file}")) == (404, "file_not_found")
    with server.with_key("ft-wrong-key") as stranger:
        assert stranger.get("/files").status_code == 401


def test_a_content_lies_on_storage_once_and_goes_with_its_last_file(client, server):
    content = b"this content is of this test alone"
    digest = hashlib.sha256(content).hexdigest()
    first, second = [send(client, content, purpose="user_data").json()["id"] for _ in range(2)]
    assert server.on_storage()["content"].count(digest) == 1
    client.delete(f"/files/{first}")
    assert client.get(f"/files/{second}/content").content == content
    client.delete(f"/files/{second}")
    assert digest not in server.on_storage().get("content", [])
    assert error(client.delete(f"/files/{second}")) == (404, "file_not_found")
    deleted = [entry.target for entry in audit_log(server.engine()) if entry.action == "files.delete"]
    assert {first, second} <= set(deleted)


def test_the_errors_of_a_file_go_with_it(client, server):
    file = send(client, b"{broken\n").json()["id"]
    assert f"{file}.jsonl" in server.on_storage()["errors"]
    client.delete(f"/files/{file}")
    assert f"{file}.jsonl" not in server.on_storage().get("errors", [])


def test_an_expired_file_is_gone_at_once_and_its_content_at_the_next_tidying(client, server):
    content = b"this one expires"
    digest = hashlib.sha256(content).hexdigest()
    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = send(client, content, purpose="user_data", **expiry).json()["id"]
    keeper_of(server).tidy()
    assert client.get(f"/files/{file}").is_success
    with session(server.engine()) as opened:
        opened.execute(update(FileRow).where(FileRow.id == file).values(expires=datetime.now(UTC)))
        opened.commit()
    assert error(client.get(f"/files/{file}")) == (404, "file_not_found")
    assert client.get("/files").json()["data"] == []
    assert digest in server.on_storage()["content"]
    keeper_of(server).tidy()
    assert digest not in server.on_storage().get("content", [])


# -- faults ------------------------------------------------------------------------------------------------------------


class Full:
    """A stream on a disk that is full."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def on_full_disk(self: Storage, path: str, writing: Any = Storage.writing) -> Iterator[BinaryIO | Full]:
    with writing(self, path) as stream:
        yield Full() if path.startswith(INCOMING) else stream


def test_a_full_disk_is_a_503_that_says_so_and_leaves_nothing(client, server, monkeypatch):
    before = server.on_storage()
    monkeypatch.setattr(Storage, "writing", on_full_disk)
    response = send(client)
    assert error(response) == (503, "storage_error")
    assert "No space left on device" in response.json()["error"]["message"]
    assert server.on_storage() == before
    monkeypatch.undo()
    assert send(client).is_success


@pytest.mark.parametrize("method", ["move", "size"])
def test_a_storage_that_is_away_when_a_file_is_published_is_a_503_and_leaves_nothing(
    client, server, monkeypatch, method
):
    def away(*_: object) -> None:
        raise UnreachableError("storage = '/mnt': does not answer.")

    before = server.on_storage()
    monkeypatch.setattr(Storage, method, away)
    content = f"a content that needs {method}".encode()
    assert error(send(client, content, purpose="user_data")) == (503, "storage_error")
    monkeypatch.undo()
    assert server.on_storage() == before and client.get("/files").json()["data"] == []


def test_a_file_whose_content_cannot_be_deleted_is_gone_for_clients_and_the_same_call_goes_on(
    client, server, monkeypatch
):
    def away(*_: object) -> None:
        raise UnreachableError("storage = '/mnt': does not answer.")

    content = b"a content that stays"
    file = send(client, content, purpose="user_data").json()["id"]
    monkeypatch.setattr(Storage, "delete", away)
    assert error(client.delete(f"/files/{file}")) == (503, "storage_error")
    monkeypatch.undo()
    assert client.get(f"/files/{file}").status_code == 404 and client.get("/files").json()["data"] == []
    assert hashlib.sha256(content).hexdigest() in server.on_storage()["content"]
    assert client.delete(f"/files/{file}").is_success  # stock clients repeat what got a 503
    assert hashlib.sha256(content).hexdigest() not in server.on_storage().get("content", [])
    assert client.delete(f"/files/{file}").status_code == 404


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_deletion_that_is_killed_at_the_content_is_finished_by_tidying(client, server, when, comes_back):
    """`comes_back`: the same bytes are uploaded meanwhile."""
    content = f"a content that is being deleted {when} {comes_back}".encode()
    file = send(client, content, purpose="user_data").json()["id"]
    keeper = keeper_of(server)

    def killed(digest: str) -> None:
        if when == "after":
            keeper.store.delete_content(digest)
        raise Killed

    with pytest.raises(Killed):
        keeper.records.delete(Tenant("root", "root", None, sees_all=True), file, killed)
    assert client.get(f"/files/{file}").status_code == 404
    again = send(client, content, purpose="user_data").json()["id"] if comes_back else None
    keeper_of(server).tidy()
    if again is not None:
        assert client.get(f"/files/{again}/content").content == content
    else:
        assert hashlib.sha256(content).hexdigest() not in server.on_storage().get("content", [])
    with session(server.engine()) as opened:
        assert opened.get(FileRow, file) is None
        assert [entry.target for entry in audit_log(server.engine(), 10_000)].count(file) == 1


def test_a_locked_database_is_a_503_and_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_MILLISECONDS", 50)
    with file_server(base, tmp_path) as server, server.with_key(ROOT_KEY) as client:
        other = sqlite3.connect(tmp_path / "service.db")
        other.execute("BEGIN IMMEDIATE")
        response = send(client)
        assert error(response) == (503, "database_error") and "locked" in response.json()["error"]["message"]
        other.rollback()
        other.close()
        assert server.on_storage() == {}
        assert send(client).is_success


def test_everything_goes_on_while_a_file_is_checked(server, client, monkeypatch):
    may_end = threading.Event()
    check = file_checks.check_file

    def slow_check(*arguments: Any) -> Any:
        may_end.wait(60)
        return check(*arguments)

    monkeypatch.setattr(file_checks, "check_file", slow_check)
    monkeypatch.setattr(file_routes, "CHECK_SECONDS", 0)
    try:
        files = [send(client).json()["id"] for _ in range(20)]
        assert {client.get(f"/files/{file}").json()["status"] for file in files} == {"uploaded"}
        assert httpx.get(f"{server.url}/health").is_success
        assert send(client, b"other", purpose="user_data").json()["status"] == "processed"
    finally:
        may_end.set()
    wait_until(lambda: {client.get(f"/files/{file}").json()["status"] for file in files} == {"processed"})


def test_a_bug_in_the_check_ends_in_a_status(client, monkeypatch):
    monkeypatch.setattr(file_checks, "check_file", lambda *_: 1 / 0)
    file = send(client).json()
    assert (file["status"], file["validation"]) == ("error", None)
    assert "ZeroDivisionError" in file["status_details"]


def test_interrupted_processes_leave_nothing_for_long_and_their_checks_are_done(client, server, monkeypatch):
    folder = server.storage / "files"
    old = datetime.now(UTC) - timedelta(days=2)
    orphans = [
        folder / "content" / ("0" * 64),
        folder / f"incoming/file-{int(old.timestamp() * 1e6):013x}{'0' * 11}.abc.partial",
        folder / f"parts/{new_id('upload_')}/part_1",
        folder / f"errors/{new_id('file-')}.jsonl",
    ]
    young = folder / f"incoming/{new_id('file-')}.abc.partial"
    for path in (*orphans, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    kept = send(client, b"a content with a file", purpose="user_data").json()["id"]
    monkeypatch.setattr(file_checks.FileChecks, "check", lambda *_: None)  # as if the process had died
    file = send(client).json()
    assert file["status"] == "uploaded"
    monkeypatch.undo()
    with session(server.engine()) as opened:
        opened.execute(update(FileRow).where(FileRow.id == file["id"]).values(checked_since=old))
        opened.commit()
    keeper_of(server).tidy()
    assert not any(path.exists() for path in orphans) and young.exists()
    young.unlink()
    assert client.get(f"/files/{kept}/content").content == b"a content with a file"
    assert client.get(f"/files/{file['id']}").json()["status"] == "processed"


def test_sixty_four_writers_at_once_lose_nothing(server, client):
    """Half of them send the same bytes, and delete them again meanwhile."""

    def write(number: int) -> tuple[str, bytes]:
        shared = jsonl(*[EXAMPLE] * 11)
        content = shared if number % 2 else jsonl(*[EXAMPLE] * 10, {"messages": number})
        response = send(client, content)
        assert response.status_code == 200, response.text
        file = response.json()["id"]
        if number % 4 == 1:
            assert client.delete(f"/files/{file}").is_success
            return "", b""
        return file, content

    with ThreadPoolExecutor(64) as pool:
        made = [one for one in pool.map(write, range(64)) if one[0]]
    assert len(made) == 48
    for file, content in made:
        assert client.get(f"/files/{file}/content").content == content
    listed = client.get("/files").json()["data"]
    assert {file["id"] for file in listed} == {file for file, _ in made}


# -- uploads in parts --------------------------------------------------------------------------------------------------


def upload_of(size: int, **others: object) -> dict[str, object]:
    return {"bytes": size, "filename": "big.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune", **others}


def add_part(client: httpx.Client, upload: str, content: bytes) -> httpx.Response:
    return client.post(f"/uploads/{upload}/parts", files={"data": content})


def test_a_file_in_parts_is_the_same_file(client, server):
    middle = len(TRAINING) // 2
    expiry = {"anchor": "created_at", "seconds": 7200}
    upload = client.post("/uploads", json=upload_of(len(TRAINING), expires_after=expiry)).json()
    assert (upload["object"], upload["status"], upload["file"]) == ("upload", "pending", None)
    second = add_part(client, upload["id"], TRAINING[middle:]).json()  # in any order
    first = add_part(client, upload["id"], TRAINING[:middle]).json()
    assert (first["object"], first["upload_id"]) == ("upload.part", upload["id"])
    listed = client.get(f"/uploads/{upload['id']}/parts").json()["data"]
    assert [part["id"] for part in listed] == [second["id"], first["id"]]
    body = {"part_ids": [first["id"], second["id"]], "md5": hashlib.md5(TRAINING).hexdigest()}
    done = client.post(f"/uploads/{upload['id']}/complete", json=body).json()
    assert done["status"] == "completed" and done["file"]["filename"] == "big.jsonl"
    file = done["file"]["id"]
    assert client.get(f"/files/{file}/content").content == TRAINING
    assert done["file"]["expires_at"] - done["file"]["created_at"] == 7200
    wait_until(lambda: client.get(f"/files/{file}").json()["status"] == "processed")
    again = client.post(f"/uploads/{upload['id']}/complete", json=body).json()
    assert again["file"]["id"] == file  # clients repeat a request that was slow
    assert client.get(f"/uploads/{upload['id']}").json()["status"] == "completed"
    assert "parts" not in server.on_storage() and "incoming" not in server.on_storage()


def test_parts_that_do_not_make_the_file_are_refused_and_can_be_sent_again(client):
    upload = client.post("/uploads", json=upload_of(10)).json()["id"]
    first = add_part(client, upload, b"12345").json()["id"]
    complete = f"/uploads/{upload}/complete"
    assert error(add_part(client, upload, b"1234567")) == (400, "too_many_bytes")
    assert error(client.post(complete, json={"part_ids": [first]})) == (400, "size_mismatch")
    assert error(client.post(complete, json={"part_ids": [first, first]})) == (400, "invalid_value")
    assert error(client.post(complete, json={"part_ids": ["part_x\0"]})) == (400, "part_not_found")
    assert error(client.post(complete, json={"part_ids": []})) == (400, "invalid_value")
    second = add_part(client, upload, b"67890").json()["id"]
    body = {"part_ids": [first, second], "md5": "0" * 32}
    assert error(client.post(complete, json=body)) == (400, "checksum_mismatch")
    assert client.post(complete, json={"part_ids": [first, second]}).json()["status"] == "completed"
    assert error(add_part(client, upload, b"x")) == (400, "invalid_upload_state")
    assert error(client.post(f"/uploads/{upload}/cancel")) == (400, "invalid_upload_state")


def test_the_same_completion_twice_at_once_makes_one_file(client):
    upload = client.post("/uploads", json=upload_of(len(TRAINING))).json()["id"]
    body = {"part_ids": [add_part(client, upload, TRAINING).json()["id"]]}
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: client.post(f"/uploads/{upload}/complete", json=body).json(), range(4)))
    assert len({one["file"]["id"] for one in done}) == 1
    assert len(client.get("/files").json()["data"]) == 1


def test_a_cancelled_or_expired_upload_leaves_nothing(client, server):
    cancelled, expired = [client.post("/uploads", json=upload_of(MIB)).json()["id"] for _ in range(2)]
    for upload in (cancelled, expired):
        add_part(client, upload, b"x" * 1000)
    assert client.post(f"/uploads/{cancelled}/cancel").json()["status"] == "cancelled"
    assert client.post(f"/uploads/{cancelled}/cancel").json()["status"] == "cancelled"
    with session(server.engine()) as opened:
        opened.execute(update(UploadRow).where(UploadRow.id == expired).values(expires=datetime.now(UTC)))
        opened.commit()
    assert client.get(f"/uploads/{expired}").json()["status"] == "expired"
    assert error(add_part(client, expired, b"x")) == (400, "invalid_upload_state")
    keeper_of(server).tidy()
    assert "parts" not in server.on_storage()


def test_limits_of_uploads(client, server):
    assert error(client.post("/uploads", json=upload_of(9 * MIB))) == (413, "file_too_large")
    assert error(client.post("/uploads", json=upload_of(0))) == (400, "invalid_value")
    upload = client.post("/uploads", json=upload_of(4 * MIB)).json()["id"]
    assert error(add_part(client, upload, b"x" * (2 * MIB + 1))) == (413, "file_too_large")
    assert "parts" not in server.on_storage()
    with server.client("another key") as other:
        for response in (
            other.get(f"/uploads/{upload}"),
            add_part(other, upload, b"x"),
            other.post(f"/uploads/{upload}/complete", json={"part_ids": ["part_1"]}),
            other.post(f"/uploads/{upload}/cancel"),
        ):
            assert error(response) == (404, "upload_not_found")


def test_a_server_without_fine_tuning_says_what_it_needs(base, tmp_path):
    models = ServedModels(Registry(Storage(str(tmp_path))), [load_base(BaseSettings(base=str(base), name="tiny"))])
    with served(create_api(models, {"tiny": Idle()}, ServeSettings(storage=str(tmp_path), api_key=None))) as url:
        response = httpx.post(f"{url}/v1/files", files={"file": b"x"}, data={"purpose": "fine-tune"})
    assert error(response) == (501, "fine_tuning_not_available")
    assert response.headers["x-should-retry"] == "false"
