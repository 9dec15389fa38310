"""Files and uploads with OpenAI's own client, of today and of before, unmodified."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serve.fine_tuning.file_world import (
    EXAMPLE,
    ROOT_KEY,
    TRAINING,
    FileServer,
    file_server,
    jsonl,
    write_tiny_base,
)
from tests.serve.test_clients import EARLIER_CLIENT

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import hashlib, json, sys, openai
url, key, train, wrong = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)
after = {"anchor": "created_at", "seconds": 3600}
made = client.files.create(file=open(train, "rb"), purpose="fine-tune", expires_after=after)
made = client.files.wait_for_processing(made.id, poll_interval=0.1)
refused = client.files.create(file=open(wrong, "rb"), purpose="fine-tune")
others = [client.files.create(file=("データ.txt", b"%d" % n), purpose="user_data").id for n in range(5)]
listed = [file.id for file in client.files.list(purpose="user_data", limit=2, order="asc")]
content = client.files.content(made.id).read()
for file in client.files.list(purpose="user_data", limit=2):
    assert client.files.delete(file.id).deleted
try:
    client.files.retrieve(others[0])
    gone = None
except openai.NotFoundError as error:
    gone = error.code
data = open(train, "rb").read()
upload = client.uploads.create(bytes=len(data), filename="in-parts.jsonl", mime_type="text/jsonl", purpose="fine-tune")
parts = [client.uploads.parts.create(upload.id, data=data[start:start + 500]).id for start in range(0, len(data), 500)]
done = client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(data).hexdigest())
chunked = client.uploads.upload_file_chunked(
    file=data, filename="chunked.jsonl", bytes=len(data), mime_type="text/jsonl", purpose="fine-tune", part_size=400)
cancelled = client.uploads.create(bytes=9, filename="x", mime_type="text/plain", purpose="user_data")
try:
    client.uploads.complete(upload.id, part_ids=["part_1"])
    code = None
except openai.BadRequestError as error:
    code = error.code
print(json.dumps({
    "version": openai.__version__,
    "made": [made.status, made.bytes, made.filename, made.purpose, made.object, made.expires_at - made.created_at],
    "refused": [refused.status, refused.status_details],
    "same_order": listed == others,
    "content": content == data,
    "left": [file.filename for file in client.files.list(purpose="user_data")],
    "gone": gone,
    "uploads": [client.files.content(one.file.id).read() == data for one in (done, chunked)],
    "upload": [done.status, done.file.filename, client.uploads.cancel(cancelled.id).status],
    "code": code,
}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    base = write_tiny_base(tmp_path_factory.mktemp("base"))
    with file_server(base, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize("folder", [None, EARLIER_CLIENT], ids=["today", "1.109.1"])
def test_the_stock_client_uploads_lists_downloads_and_deletes(server: FileServer, tmp_path: Path, folder: Path | None):
    train = tmp_path / "訓練.jsonl"
    train.write_bytes(TRAINING)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_bytes(jsonl(*[EXAMPLE] * 9, {"messages": []}))
    command = [sys.executable, "-c", SCRIPT, server.url, ROOT_KEY, str(train), str(wrong)]
    environment = {"PYTHONPATH": str(folder)} if folder else {}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    summary = json.loads(ran.stdout)
    assert summary.pop("version") == ("1.109.1" if folder else openai.__version__)
    status, details = summary.pop("refused")
    assert status == "error"
    assert details == "1 error. line 10, messages: The example has no list of messages. (missing_messages_list)."
    assert summary == {
        "made": ["processed", len(TRAINING), "訓練.jsonl", "fine-tune", "file", 3600],
        "same_order": True,
        "content": True,
        "left": [],
        "gone": "file_not_found",
        "uploads": [True, True],
        "upload": ["completed", "in-parts.jsonl", "cancelled"],
        "code": "invalid_upload_state",
    }
