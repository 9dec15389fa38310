"""Every part that keeps something on storage, on an S3 server with faults.

Passing faults (throttling, 5xx, no answer, broken connections) are retried and lose nothing. Lasting ones (expired
credentials, a bucket that has become read-only) are one clear error; what is on storage is whole, and work goes on once
the fault is lifted.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine

import ft_service.storage.retry
from ft_service.cli.app import main
from ft_service.data.dataset import open_dataset
from ft_service.data.prepare import prepare_dataset
from ft_service.errors import StorageError, TrainingError, UnreachableError, UsageError
from ft_service.model.scratch import train_tokenizer
from ft_service.registry.registry import Registry
from ft_service.runs.events import EventLog, Notice, read_events
from ft_service.runs.folder import LeaseHolder, RunFolder
from ft_service.runs.lease import Lease
from ft_service.runs.metrics import JsonlSink, read_metrics
from ft_service.spec.load import parse_run_spec
from ft_service.storage import object_store
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import Checkpoints
from ft_service.train.checkpoints.resume import resume
from serve.database.database import open_database
from serve.fine_tuning.files import FileStore
from serve.fine_tuning.job_files import JobFolder
from serve.voting.ballots import Ballot, Ballots
from serve.voting.files import StudyFolder
from serve.voting.links import Rater
from serve.voting.stored import stored_votes
from tests.data.test_prepare import alpaca_records
from tests.registry.test_registry import publish
from tests.serve.voting.voting_world import make_study
from tests.storage.object_stores import (
    BUCKET,
    DENIED,
    EXPIRED,
    INTERNAL_ERROR,
    SLOW_DOWN,
    FaultyS3,
    cut,
    faulty_s3,
    no_answer,
    refusal,
    retry_quickly,
)
from tests.storage.test_storage_faults import (
    RUN,
    Alone,
    checkpointer,
    events_of,
    metrics_of,
    save,
    save_as_one_worker,
    sound_steps,
)

WRITES = "PUT|POST|DELETE"


@pytest.fixture(scope="module")
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses between attempts, and copies of this test's own."""
    retry_quickly(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(ft_service.storage.retry, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("HOME", str(tmp_path))


# -- the parts ---------------------------------------------------------------------------------------------------------


class Part:
    """A part that keeps something on storage."""

    step = 1
    """A read-only bucket is tried after each so many writes."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage = storage
        self.folder = folder

    def prepare(self) -> None:
        """What is there before the fault."""

    def do(self) -> None:
        """The work that meets the fault. Doing it again completes it."""
        raise NotImplementedError

    def check_done(self) -> None:
        """All that `do` promises is on storage."""
        raise NotImplementedError

    def check_whole(self) -> None:
        """After `do` has failed: what is there is whole."""


class RunState(Part):
    def do(self) -> None:
        run = RunFolder(self.storage, RUN)
        with Lease(run, log=lambda text: None):
            run.set_state("running")
            sink = JsonlSink(self.storage, RUN)
            sink.rewind(0)
            sink(metrics_of(1))
            sink.flush()
            assert EventLog(self.storage, RUN).emit(Notice(type="preparing", message="data and plan"))

    def check_done(self) -> None:
        run = RunFolder(self.storage, RUN)
        assert run.recorded_state() == "running" and run.lease_holder() is None
        assert [one.step for one in read_metrics(self.storage, RUN)] == [1]
        assert {event.type for event in read_events(self.storage, RUN)} == {"preparing"}


class SavedCheckpoint(Part):
    def prepare(self) -> None:
        save_as_one_worker(RunFolder(self.storage, RUN), 10, "a")

    def do(self) -> None:
        save_as_one_worker(RunFolder(self.storage, RUN), 20, "b")

    def check_done(self) -> None:
        assert sound_steps(RunFolder(self.storage, RUN)) == [10, 20]

    def check_whole(self) -> None:
        assert sound_steps(RunFolder(self.storage, RUN)) in ([10], [10, 20])


class Resume(Part):
    def prepare(self) -> None:
        for step in (10, 20):
            save_as_one_worker(RunFolder(self.storage, RUN), step, "a")

    def do(self) -> None:
        run = RunFolder(self.storage, RUN)
        assert sound_steps(run) == [10, 20]
        with pytest.raises(TrainingError, match="another model"):  # it comes as far as to read a manifest
            resume(run, Alone(), SimpleNamespace(continues=lambda digest, step: False), EventLog(self.storage, RUN))  # type: ignore[arg-type]

    def check_done(self) -> None:
        assert read_events(self.storage, RUN) == []  # no checkpoint passed for damaged


class Dataset(Part):
    step = 4
    tokenizer = train_tokenizer(["how many words are there in answer number one"] * 4, vocab_size=340)

    def prepare(self) -> None:
        records = "".join(json.dumps(record) + "\n" for record in alpaca_records(40))
        self.storage.write_bytes("data/train.jsonl", records.encode())

    def do(self) -> None:
        source = {"path": self.storage.uri("data/train.jsonl"), "format": "alpaca"}
        document = {
            "name": "case",
            "model": {"base": "none"},
            "data": {"train": [source], "max_seq_len": 512},
            "storage": self.storage.root,
        }
        self.digest = prepare_dataset(parse_run_spec(json.dumps(document)), self.tokenizer, self.storage).digest

    def check_done(self) -> None:
        dataset = open_dataset(self.storage, self.digest)
        assert dataset.facts.conversations == 40 and len(dataset.train) == dataset.facts.rows

    def check_whole(self) -> None:
        for digest in self.storage.folders("datasets"):
            if self.storage.exists(f"datasets/{digest}/manifest.json"):
                assert len(open_dataset(self.storage, digest).train) > 0


class Publish(Part):
    def do(self) -> None:
        for attempt in count():
            if not (folder := self.folder / f"weights-{attempt}").exists():
                break
        self.record = publish(self.storage, folder, b"weights")

    def check_done(self) -> None:
        registry = Registry(self.storage)
        assert registry.records() == [self.record] and registry.damaged_files(self.record) == []

    def check_whole(self) -> None:
        registry = Registry(self.storage)
        assert all(registry.damaged_files(record) == [] for record in registry.records())
        listed = {record.id for record in registry.records()}
        assert listed <= set(self.storage.folders("adapters"))


class PublishStored(Publish):
    """As a `full` run does: the weights are on the storage already."""

    def prepare(self) -> None:
        self.storage.write_json("run/weights/digests.json", {"model.safetensors": "a" * 64})
        self.storage.write_bytes("run/weights/model.safetensors", b"weights")

    def do(self) -> None:
        from tests.registry.test_registry import DRAFT

        self.record = Registry(self.storage).publish_stored("run/weights", DRAFT | {"kind": "model"}, "llama", "c")

    def check_done(self) -> None:
        assert Registry(self.storage).records("model") == [self.record]
        assert self.storage.read_bytes(f"models/{self.record.id}/model.safetensors") == b"weights"

    def check_whole(self) -> None:
        for record in Registry(self.storage).records("model"):
            assert self.storage.read_bytes(f"models/{record.id}/model.safetensors") == b"weights"


class Serve(Part):
    """What a replica reads before it answers with an adapter."""

    def prepare(self) -> None:
        self.id = publish(self.storage, self.folder / "weights", b"weights").id

    def do(self) -> None:
        registry = Registry(self.storage)
        record = registry.resolve(self.id)
        assert registry.damaged_files(record) == []
        assert [found.id for found in registry.records()] == [self.id]

    check_done = do


class Votes(Part):
    def prepare(self) -> None:
        self.engine: Engine = open_database(f"sqlite:///{self.folder}/service.db")
        self.study = make_study(self.engine, self.storage.root, questions=1, raters=["anna"], votes_per_item=1)

    def do(self) -> None:
        rater = Rater(self.study.study.raters[0], self.study.study.name)
        (assignment,) = self.study.study.assignments
        Ballots(self.engine, self.storage).vote(
            rater, Ballot(assignment=assignment.id, round=0, outcome="left", note="clear")
        )

    def check_done(self) -> None:
        (vote,) = stored_votes(StudyFolder(self.storage, self.study.study.name))
        assert vote.outcome == "left"

    def check_whole(self) -> None:
        """A vote that the store may have kept does not count in the database yet, and counts once when sent again."""
        assert len(stored_votes(StudyFolder(self.storage, self.study.study.name))) <= 1


class FilesOfJobs(Part):
    content = b"a line\n" * 1000

    def do(self) -> None:
        store = FileStore(self.storage)
        arrival = store.arrive("file-1")
        try:
            arrival.write(self.content)
            arrival.finish()
        except BaseException:
            arrival.abandon()
            raise
        store.publish(arrival)
        self.digest = arrival.digest
        JobFolder(self.storage, "job-1").link_data("files/content", {"training": arrival.digest})

    def check_done(self) -> None:
        assert self.storage.files("files/incoming") == []
        assert FileStore(self.storage).block(self.digest, 0, len(self.content)) == self.content
        linked = JobFolder(self.storage, "job-1").data("training")
        assert linked == self.storage.uri(f"jobs/job-1/data/{self.digest}")
        assert self.storage.read_bytes(f"jobs/job-1/data/{self.digest}") == self.content

    def check_whole(self) -> None:
        for name in self.storage.files("files/content"):
            assert self.storage.read_bytes(f"files/content/{name}") == self.content


PARTS = (RunState, SavedCheckpoint, Resume, Dataset, Publish, PublishStored, Serve, Votes, FilesOfJobs)
WRITERS = tuple(part for part in PARTS if part not in (Resume, Serve))


def made(kind: type[Part], s3: FaultyS3, folder: Path, retry_seconds: float = 0.0) -> Part:
    folder.mkdir(exist_ok=True)
    part = kind(Storage(s3.root(), retry_seconds), folder)
    part.prepare()
    return part


def named(kind: type[Part]) -> str:
    return kind.__name__


# -- passing faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["slow down", "internal error", "cut", "answer lost", "no answer"])
@pytest.mark.parametrize("kind", PARTS, ids=named)
def test_a_passing_fault_of_every_request_loses_nothing(
    s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Part], fault: str
) -> None:
    """Each request meets the fault the first time that it is sent."""
    answers = {
        "slow down": SLOW_DOWN,
        "internal error": INTERNAL_ERROR,
        "cut": cut,
        "answer lost": s3.losing_answers,
        "no answer": no_answer,
    }
    if fault == "no answer":
        monkeypatch.setattr(object_store, "_TIMEOUTS", {"connect_timeout": "5s", "timeout": "100ms"})
    part = made(kind, s3, tmp_path / "part", retry_seconds=60)
    with s3.fault(answers[fault], once_each=True) as met:
        part.do()
        assert met.hits > 0
    part.check_done()


# -- lasting faults ----------------------------------------------------------------------------------------------------


def fails_clearly(do: Callable[[], None], cure: str) -> None:
    with pytest.raises(StorageError) as raised:
        do()
    text = str(raised.value)
    assert not isinstance(raised.value, UnreachableError), text
    assert BUCKET in text and cure in text and "\n" not in text
    assert re.search(r"cannot (be \w+|write)", text)


@pytest.mark.parametrize("kind", PARTS, ids=named)
def test_expired_credentials_are_named_and_work_goes_on_with_new_ones(
    s3: FaultyS3, tmp_path: Path, kind: type[Part]
) -> None:
    part = made(kind, s3, tmp_path / "part", retry_seconds=1e9)  # waiting would not help, so it does not
    with s3.fault(EXPIRED):
        fails_clearly(part.do, "Renew the credentials")
    part.check_whole()
    part.do()
    part.check_done()


@pytest.mark.parametrize("kind", WRITERS, ids=named)
def test_a_bucket_that_becomes_read_only_at_any_write_holds_nothing_half(
    s3: FaultyS3, tmp_path: Path, kind: type[Part]
) -> None:
    for writes in count(step=kind.step):
        part = made(kind, s3, tmp_path / f"part-{writes}", retry_seconds=1e9)
        with s3.fault(DENIED, methods=WRITES, after=writes) as met:
            if writes == 0:
                fails_clearly(part.do, "Allow these credentials to read, write, list and delete there")
            else:
                with suppress(StorageError, AssertionError):
                    part.do()
        part.check_whole()
        part.do()
        part.check_done()
        if met.hits == 0:
            break
    assert writes > 0


@pytest.mark.parametrize("kind", [Resume, Serve], ids=named)
def test_what_only_reads_works_on_a_read_only_bucket(s3: FaultyS3, tmp_path: Path, kind: type[Part]) -> None:
    part = made(kind, s3, tmp_path / "part")
    with s3.fault(DENIED, methods=WRITES):
        part.do()
        part.check_done()


def test_training_goes_on_when_a_checkpoint_meets_a_read_only_bucket(
    s3: FaultyS3, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(Storage(s3.root(), retry_seconds=1e9), RUN)
    saver = checkpointer(run)
    save(saver, 5)
    with s3.fault(DENIED, methods=WRITES):
        save(saver, 10)
    assert "Allow these credentials" in capsys.readouterr().err
    save(saver, 15)
    assert [entry.step for entry in Checkpoints(run).entries()] == [5, 15]
    assert [reported["step"] for reported in events_of(run, "checkpoint_failed")] == [10]


COMMANDS = (
    ["runs"],
    ["show", "bot-1"],
    ["adapters"],
    ["du"],
    ["prune", "--yes"],
    ["runs", "delete", "bot-1", "--yes"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_prints_one_line_and_no_traceback(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    root = s3.root()
    RunFolder(Storage(root), RUN).set_state("failed")
    monkeypatch.setattr(sys, "argv", ["ft", *command, "--storage", root])
    with s3.fault(EXPIRED), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and "Renew the credentials" in line


# -- uploads in parts --------------------------------------------------------------------------------------------------


def write_large(storage: Storage, path: str) -> None:
    with storage.writing(path) as stream:
        for _ in range(3):
            stream.write(bytes(object_store._PART_BYTES // 2))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_PART_BYTES", 5 * 2**20)  # S3's smallest


@pytest.mark.parametrize("at", ["partNumber=2", "uploadId=[^&]*$"], ids=["part", "completion"])
@pytest.mark.parametrize("how", ["stream", "file", "bytes"])
def test_a_failed_upload_in_parts_is_aborted(
    s3: FaultyS3, tmp_path: Path, small_parts: None, at: str, how: str
) -> None:
    storage = Storage(s3.root())
    content = bytes(8 * 2**20)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/large").write_bytes(content)
    (tmp_path / "folder/marker").write_bytes(b"m")
    ways: dict[str, Callable[[], None]] = {
        "stream": lambda: write_large(storage, "folder/large"),
        "file": lambda: storage.put_folder(tmp_path / "folder", "folder", marker="marker"),
        "bytes": lambda: storage.write_bytes("folder/large", content),
    }
    with s3.fault(DENIED, methods="PUT|POST", keys=at) as met, pytest.raises(StorageError, match="Allow these"):
        ways[how]()
    assert met.hits >= 1
    assert s3.unfinished_uploads() == [] and storage.files("folder") == []
    ways[how]()
    assert storage.size("folder/large") in (len(content), 3 * (object_store._PART_BYTES // 2))


def test_an_abandoned_stream_is_aborted(s3: FaultyS3, small_parts: None) -> None:
    storage = Storage(s3.root())
    with pytest.raises(KeyboardInterrupt), storage.writing("large") as stream:
        for _ in range(3):
            stream.write(bytes(object_store._PART_BYTES))
        raise KeyboardInterrupt
    assert s3.unfinished_uploads() == [] and not storage.exists("large")


def test_an_object_that_the_store_does_not_copy_passes_through_this_machine(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    monkeypatch.setattr(object_store, "_COPIED_BY_STORE_BYTES", 2**20)
    storage = Storage(s3.root())
    content = bytes(range(256)) * 4096 * 6
    storage.write_bytes("a/large", content)
    too_large = refusal("400 Bad Request", "InvalidRequest")
    with s3.fault(too_large, methods="PUT", keys=r"/moved\?$") as met:
        storage.move("a/large", "b/moved")
    assert met.hits == 1
    assert storage.read_bytes("b/moved") == content and not storage.exists("a/large")


# -- leases ------------------------------------------------------------------------------------------------------------


def silent(text: str) -> None:
    pass


def test_of_two_drivers_whose_writes_a_slow_store_delays_one_fails(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have read that there is no lease; the second writes long after the first has started to work."""
    storage = Storage(s3.root())
    second = Lease(RunFolder(storage, RUN), silent)
    real = RunFolder.write_lease
    first = Lease(RunFolder(storage, RUN), silent)

    def delayed(self: RunFolder, *given: Any) -> bool:
        monkeypatch.setattr(RunFolder, "write_lease", real)
        first.__enter__()
        return real(self, *given)

    monkeypatch.setattr(RunFolder, "write_lease", delayed)
    with pytest.raises(UsageError, match="another driver started this run"), second:
        pass
    assert first.is_held()
    first.__exit__(None, None, None)
    with second_driver(storage):
        pass


def second_driver(storage: Storage) -> Lease:
    return Lease(RunFolder(storage, RUN), silent)


def test_a_renewal_never_overwrites_a_driver_that_has_taken_over(s3: FaultyS3) -> None:
    """The check that the lease is still ours and the renewal are two requests; another driver comes in between."""
    run = RunFolder(Storage(s3.root()), RUN)
    ours, theirs = (
        LeaseHolder(token=token, host="host", machine="machine", pid=1, time=datetime.now(UTC))
        for token in ("ours", "theirs")
    )
    assert run.write_lease(ours, None)
    _, version = run.lease()
    _, taken = run.lease()
    assert run.write_lease(theirs, taken)
    assert not run.write_lease(ours, version)
    assert run.lease_holder() == theirs


def test_a_lease_whose_answer_was_lost_is_held(s3: FaultyS3) -> None:
    storage = Storage(s3.root())
    with s3.fault(s3.losing_answers, methods="PUT", once_each=True) as met, second_driver(storage) as lease:
        assert met.hits == 1 and lease.is_held()


def test_a_store_without_conditional_writes_keeps_leases_as_a_folder_does(s3: FaultyS3) -> None:
    storage = Storage(f"{s3.root()}&conditional_put=disabled")
    with second_driver(storage) as lease:
        assert lease.is_held()
    assert RunFolder(storage, RUN).lease_holder() is None


# -- other stores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root", "place"),
    [
        ("s3://bucket/ft?region=eu-west-1", "s3://bucket/ft/runs?region=eu-west-1"),
        ("gs://bucket/ft", "gs://bucket/ft/runs"),
        ("gcs://bucket/ft", "gcs://bucket/ft/runs"),
        ("az://container/ft?account_name=desk", "az://container/ft/runs?account_name=desk"),
        ("abfss://container@desk.dfs.core.windows.net/ft", "abfss://container@desk.dfs.core.windows.net/ft/runs"),
    ],
)
def test_all_stores_are_opened_by_one_path(root: str, place: str) -> None:
    storage = Storage(root)
    assert not storage.is_local and storage.uri("runs") == place
    assert storage.arrow("ray")[0] is not None


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("hdfs://host/ft", "Use a folder, s3://, gs:// or az://"),
        ("az://container/ft", r"Account must be specified.*account_name=NAME"),
        ("s3://bucket/ft?regoin=eu-west-1&region=eu-west-1", "regoin"),
        ("s3://key:c4nary@bucket/ft", "contains credentials"),
        ("s3://bucket/ft?secret_access_key=c4nary", "contains credentials"),
        ("az://container/ft?account_name=desk&sas_token=c4nary", "contains credentials"),
    ],
)
def test_a_root_that_cannot_be_used_names_the_cure(root: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as raised:
        Storage(root)
    assert "c4nary" not in str(raised.value)


def test_credentials_of_a_profile_need_a_package_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "credentials").write_text("[desk]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "desk")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    assert Storage("s3://bucket/ft?region=eu-west-1")._objects is not None
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    with pytest.raises(StorageError, match=r"pip install 'ft-service\[aws\]'"):
        Storage("s3://bucket/ft?region=eu-west-1")


def test_objects_that_stand_for_folders_are_no_files(s3: FaultyS3) -> None:
    """Other clients, and versions before 0.2, make an object whose name ends in a slash for each folder."""
    import boto3

    root = s3.root()
    storage = Storage(root)
    storage.write_bytes("runs/r1/file", b"1")
    storage.write_bytes("runs/empty", b"")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}")
    prefix = root.removeprefix(f"s3://{BUCKET}/").partition("?")[0]
    for folder in ("", "runs/", "runs/r1/", "runs/r2/"):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{folder}", Body=b"")
    assert [file.path for file in storage.tree()] == ["runs/empty", "runs/r1/file"]
    assert storage.files("runs") == ["empty"] and storage.files("runs/r1") == ["file"]
    assert storage.files("") == []
