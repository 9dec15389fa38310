"""Files, uploads and jobs of a server whose storage is an object store: an S3 server on this machine."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from ft_service.data.files import remote
from ft_service.data.read import check_sources, read_source, scan
from ft_service.errors import DataError
from ft_service.registry.registry import Registry
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import DataSource
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.fine_tuning.api_files import ApiFiles
from serve.fine_tuning.checks import Checked
from serve.fine_tuning.controller import Controller, Outside
from serve.fine_tuning.file_keeper import FileKeeper
from serve.fine_tuning.files import CONTENT, INCOMING, PARTS
from serve.fine_tuning.job_files import JobFolder
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.jobs import TRAINING, check_linked
from serve.fine_tuning.templates import with_templates_read
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import ServeSettings
from tests.browser import served
from tests.serve.fine_tuning.file_world import TRAINING as TRAINING_BYTES
from tests.serve.fine_tuning.job_world import AtOnce, World, make_world
from tests.serve.fine_tuning.test_jobs import chat_records
from tests.serve.test_health import Idle
from tests.storage.object_stores import DENIED, EXPIRED, FaultyS3, faulty_s3

KEY = "a-key-of-this-test"
BASE = "tiny"


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture
def root(s3: FaultyS3) -> str:
    return s3.root()


class Server:
    """The whole API on object storage, with a controller whose runs are stand-ins."""

    def __init__(self, world: World, base_folder: Path) -> None:
        self.world = world
        template = {
            "method": {"type": "lora", "lora_rank": 4},
            "data": {"max_seq_len": 128},
            "train": {"learning_rate": 1e-3, "precision": "fp32", "global_batch_size": 8},
            "parallel": {"use_gpu": False},
            "report": {"samples": 0},
        }
        self.settings = with_templates_read(
            ServeSettings.model_validate(
                {
                    "storage": world.storage.root,
                    "database": world.engine.url.render_as_string(hide_password=False),
                    "api_key": KEY,
                    "bases": [{"base": str(base_folder), "name": BASE}],
                    "fine_tuning": {"templates": {BASE: template}},
                }
            )
        )
        tuning = self.settings.fine_tuning
        assert tuning
        models = ServedModels(Registry(world.storage), [load_base(self.settings.bases[0])])
        self.api = create_api(models, {BASE: Idle()}, self.settings)
        self.keeper = FileKeeper(world.engine, world.storage, tuning.files, {})

    def check(self, job: Job) -> Checked:
        assert self.settings.fine_tuning
        return check_linked(job, self.world.storage, self.settings.fine_tuning)

    def controller(self) -> Controller:
        world = self.world
        add_result = ApiFiles(self.keeper).add_result
        outside = Outside(self.check, world.ask, add_result, world.webhooks, lambda: None)
        return Controller(world.records, world.storage, world.ray, outside, AtOnce(), "controller")

    def names(self, folder: str) -> list[str]:
        return [one.path.removeprefix(f"{folder}/") for one in self.world.storage.tree(folder)]


@contextmanager
def client_of(server: Server) -> Iterator[openai.OpenAI]:
    with served(server.api) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture
def server(root: str, base_folder: Path, tmp_path: Path) -> Server:
    return Server(make_world(tmp_path, storage=root), base_folder)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as opened:
        yield opened


def lines_of(folder: Path, count: int) -> bytes:
    return "\n".join(map(json.dumps, chat_records(folder, count))).encode()


def test_the_life_of_a_job_from_upload_to_model_and_result_file(client, server, tmp_path):
    content = lines_of(tmp_path, 40)
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    assert file.status == "processed"
    digest = hashlib.sha256(content).hexdigest()
    assert server.names(CONTENT) == [digest] and server.names(INCOMING) == []
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=file.id, suffix="bot", hyperparameters={"n_epochs": 2, "batch_size": 4}
    )
    assert json.loads(server.world.storage.read_bytes(f"jobs/{job.id}/job.json"))["id"] == job.id
    client.files.delete(file.id)  # the job has a copy of its own
    assert server.names(CONTENT) == []
    controller = server.controller()
    found = server.world.records.find(job.id)
    assert found is not None
    data = JobFolder(server.world.storage, job.id).data(TRAINING)
    assert data == server.world.storage.uri(f"jobs/{job.id}/data/{digest}") and data.startswith("s3://")
    server.world.until(found, "running", controller)
    spec = RunFolder(server.world.storage, found.run_id).spec()
    assert spec.data.train[0].path == data and spec.storage == server.world.storage.root
    check_sources(spec.data.train)  # where the run will read them
    client.fine_tuning.jobs.pause(job.id)
    server.world.until(found, "paused", controller)
    client.fine_tuning.jobs.resume(job.id)
    server.world.until(found, "succeeded", controller)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded" and done.fine_tuned_model == found.alias
    result = client.files.content(done.result_files[0]).text.splitlines()
    assert result[0].startswith("step,train_loss") and len(result) == 5
    assert server.names(f"jobs/{job.id}/data") == []
    assert len(list(client.fine_tuning.jobs.list_events(job.id))) > 4


def test_a_lost_controller_and_head_start_nothing_twice(client, server, tmp_path):
    file = client.files.create(file=("train.jsonl", lines_of(tmp_path, 20)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert client.fine_tuning.jobs.create(model=BASE, training_file=file.id).id == job.id
    found = server.world.records.find(job.id)
    server.world.until(found, "running", server.controller())
    server.world.ray.lose_head()
    server.world.until(found, "succeeded", server.controller())
    steps = [step for _, step in server.world.ray.trained]
    assert steps == [1, 2, 3, 4] and len(server.world.storage.folders("runs")) == 1


def test_bad_data_are_refused_with_roles_and_lines_instead_of_addresses(client, server, tmp_path):
    broken = lines_of(tmp_path, 20).replace(b'"assistant"', b'"user"', 1)
    arrival = server.keeper.store.arrive("file-1-x")  # past the check of uploads
    arrival.write(broken)
    arrival.finish()
    file = client.files.create(file=("train.jsonl", lines_of(tmp_path, 20)), purpose="fine-tune")
    (digest,) = server.names(CONTENT)
    server.world.storage.move(arrival.path, f"{CONTENT}/{digest}")
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    assert "training_file:1" in refused.value.message and "s3://" not in refused.value.message
    assert server.names("jobs") == [] and remote._copies == {}


def test_an_upload_in_parts_is_joined_and_equal_contents_are_stored_once(client, server):
    part = b"x" * 3 * 2**20
    upload = client.uploads.create(
        filename="a.bin", purpose="user_data", bytes=2 * len(part), mime_type="application/octet-stream"
    )
    parts = [client.uploads.parts.create(upload.id, data=part).id for _ in range(2)]
    assert len(server.names(f"{PARTS}/{upload.id}")) == 2
    done = client.uploads.complete(upload.id, part_ids=parts)
    assert client.files.content(done.file.id).content == part * 2
    assert server.names(PARTS) == server.names(INCOMING) == []
    again = client.files.create(file=("b.bin", part * 2), purpose="user_data")
    assert server.names(CONTENT) == [hashlib.sha256(part * 2).hexdigest()]
    client.files.delete(done.file.id)
    assert client.files.content(again.id).content == part * 2
    client.files.delete(again.id)
    assert server.names("files") == []


def test_a_wrong_file_lists_its_errors_and_leaves_no_copy(client, server):
    file = client.files.create(file=("train.jsonl", TRAINING_BYTES + b"{\n"), purpose="fine-tune")
    assert file.status == "error" and "line 11" in file.status_details
    errors = httpx.get(f"{client.base_url}files/{file.id}/errors", headers={"authorization": f"Bearer {KEY}"}).json()
    assert errors["data"][0]["line"] == 11
    client.files.delete(file.id)
    assert server.names("files") == []


@pytest.mark.parametrize("fault", [EXPIRED, DENIED], ids=["expired", "read-only"])
def test_a_store_that_refuses_is_a_503_with_its_cause_and_leaves_nothing(client, server, s3, tmp_path, fault):
    content = lines_of(tmp_path, 20)
    with s3.fault(fault, methods="PUT|POST|DELETE" if fault is DENIED else ".*"):
        with pytest.raises(openai.InternalServerError) as refused:
            client.files.create(file=("train.jsonl", content), purpose="fine-tune")
        assert (refused.value.status_code, refused.value.code) == (503, "storage_error")
        assert "credentials" in refused.value.message
        if fault is EXPIRED:
            with pytest.raises(openai.InternalServerError) as unknown:
                client.models.retrieve("an-adapter")  # not a 404: whether it exists is not known
            assert unknown.value.status_code == 503
    assert server.names("files") == []
    file = client.files.create(file=("train.jsonl", content), purpose="fine-tune")
    assert client.fine_tuning.jobs.create(model=BASE, training_file=file.id).status == "validating_files"


def test_an_interrupted_arrival_leaves_nothing_and_old_ones_are_tidied(server):
    store = server.keeper.store
    arrival = store.arrive("file-abandoned")
    arrival.write(b"half")
    arrival.abandon()
    assert server.names("files") == []
    killed = store.arrive(f"file-{0:024x}")  # begun in 1970
    killed.write(b"half")
    killed.finish()
    server.keeper.tidy()
    assert server.names("files") == []


# -- data of any run ---------------------------------------------------------------------------------------------------


def test_data_on_object_storage_are_read_as_the_same_file_in_a_folder_is(root, tmp_path):
    content = lines_of(tmp_path, 30)
    (tmp_path / "train.jsonl").write_bytes(content)
    storage = Storage(root)
    storage.write_bytes("data/train.jsonl", content)
    here = DataSource(path=str(tmp_path / "train.jsonl"), format="chat")
    there = DataSource(path=storage.uri("data/train.jsonl"), format="chat")
    scanned = scan(0, there, shard_bytes=1000)
    assert scanned.digest == scan(0, here).digest and scanned.files == (there.path,)
    assert {shard.path for shard in scanned.shards} == {there.path} and len(scanned.shards) > 1
    remote.delete_copies()  # as on another machine
    assert [record for _, record in read_source(there)] == [record for _, record in read_source(here)]
    place, _ = next(read_source(there))
    assert place == f"{there.path}:1"
    missing = DataSource(path=storage.uri("data/other.jsonl"))
    with pytest.raises(DataError, match="On object storage name a file"):
        check_sources([there, missing])
    remote.delete_copies()
    assert remote._copies == {}


def test_a_uri_on_storage_keeps_the_options_of_the_root(root):
    storage = Storage(root)
    storage.write_bytes("a/b", b"1")
    place, _, options = root.partition("?")
    assert storage.uri("a/b") == f"{place}/a/b?{options}"
    assert Storage(storage.uri("a")).read_bytes("b") == b"1"
