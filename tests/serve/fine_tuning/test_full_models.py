"""The models of `full` jobs: bases that are deployed while the server runs, found again after restarts, and deleted."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from ft_service.cleanup.removal import delete_adapter, deleted_models, finish_deletion, hide_adapter
from ft_service.cluster.queue.schedule import Node
from ft_service.errors import NotPublishedError, ServingError, UsageError
from ft_service.model.base import fingerprint
from ft_service.plan.facts import Resources
from ft_service.plan.table import shape_of
from ft_service.registry.registry import AdapterRecord, BaseModelRef, Registry
from ft_service.registry.servers import Announcement
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from serve.fine_tuning.checks import JobRefusedError, check_job
from serve.fine_tuning.controller import ANSWER_SECONDS, FULL_ANSWER_SECONDS
from serve.fine_tuning.full_models import FullModels
from serve.fine_tuning.job_records import Job
from serve.fine_tuning.jobs import serving_problems
from serve.fine_tuning.model_servers import DELETION_SECONDS, AppStatus, DoesNotStartError, ModelServers, NoRoomError
from serve.fine_tuning.run_spec import Hyperparameters, JobSettings
from serve.fine_tuning.serving_room import ServingRoom
from serve.fine_tuning.waiting import status_details
from serve.fit import full_model_problem
from serve.http.errors import ApiError
from serve.inference.bases import load_base
from serve.inference.models import ServedModels, delete_published
from serve.model_apps import application_of, applications_of
from serve.settings import BaseSettings, ServeSettings
from tests.registry.test_registry import DRAFT
from tests.serve.fine_tuning.job_world import World, make_world
from tests.serve.fine_tuning.test_controller import Killed, KilledAt
from tests.serve.fine_tuning.test_jobs import chat_records

MODEL = "tiny-run-0a1b2c3d"
"""What the stand-in of a run publishes."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = make_world(tmp_path)
    world.method = "full"
    world.ray.epoch_adapters = ()
    return world


@dataclass
class Deployed:
    """Applications as a dictionary. See `serve.fine_tuning.model_servers.Apps`."""

    running: dict[str, BaseSettings] = field(default_factory=dict)
    problems: dict[str, AppStatus] = field(default_factory=dict)
    deployments: list[str] = field(default_factory=list)
    refuses: str | None = None

    def deployed(self) -> Mapping[str, AppStatus]:
        return {model: self.problems.get(model, AppStatus()) for model in self.running}

    def deploy(self, model_id: str, base: BaseSettings) -> None:
        if model_id == self.refuses:
            raise ServingError("no controller")
        self.deployments.append(model_id)
        self.running[model_id] = base

    def delete(self, model_id: str) -> None:
        self.running.pop(model_id, None)  # Serve ignores one that is gone


class Server:
    """A server's bases, over the database and the storage of a world."""

    def __init__(self, world: World, base_folder: Path, base_name: str = "tiny", **base: object) -> None:
        self.world = world
        self.settings = ServeSettings.model_validate(
            {
                "storage": world.storage.root,
                "bases": [{"base": str(base_folder), "name": base_name, "gpus": 0, **base}],
                "fine_tuning": {"full_models": {"max_replicas": 3}},
            }
        )
        self.models = ServedModels(Registry(world.storage), [load_base(self.settings.bases[0])])
        self.models.add_names(world.records)
        self.full = FullModels(world.records, self.models.registry, self.settings, self.models.bases)
        self.models.add_bases(self.full)

    def servers(self, apps: Deployed, storage: Storage | None = None, problem: str | None = None) -> ModelServers:
        """Those of a new controller process."""
        on = storage or self.world.storage
        seconds = count(0, 2 * DELETION_SECONDS)
        return ModelServers(
            self.full,
            apps,
            partial(deleted_models, on),
            partial(finish_deletion, on),
            lambda base: problem,
            lambda base: "a GPU",
            lambda: next(seconds),
        )


@pytest.fixture
def server(world: World, base_folder: Path) -> Server:
    return Server(world, base_folder)


def publish(server: Server, base_folder: Path, tmp_path: Path, name: str = "run") -> AdapterRecord:
    """A full model: the base with another config, so that its digest is its own."""
    folder = tmp_path / f"full-{name}"
    shutil.copytree(base_folder, folder)
    (folder / "notes.json").write_text(f'"{name}"')
    base = BaseModelRef(id="base", revision=None, short_name="base", fingerprint=fingerprint(base_folder))
    draft = DRAFT | {"kind": "model", "run_name": name, "method": {"type": "full"}, "base": base.model_dump()}
    return server.models.registry.publish(folder, draft, "tiny", "# {id}")


def job_of(world: World, record: AdapterRecord, state: str = "succeeded", digit: str = "a") -> Job:
    job = world.job(digit)
    world.records.change(job, "queued")
    published = world.records.change(world.find(job), "running", adapter=record.id)
    assert published is not None
    if state != "running":
        assert world.records.change(published, state) is not None
    return world.find(job)


# -- the job -----------------------------------------------------------------------------------------------------------


def test_a_full_job_succeeds_once_its_model_is_a_base_and_has_answered_and_lists_nothing_else(world):
    job = world.job()
    done = world.until(job, "succeeded")
    assert world.served == [MODEL] and world.asked == [done.alias]
    checkpoints, _ = world.records.list_checkpoints(job.id, 10)
    assert [one.adapter for one in checkpoints] == [MODEL]
    assert "The model becomes a base of the server. It is loaded and asked." in world.messages(job)


def test_the_job_of_an_adapter_makes_no_base(world):
    world.method = "lora"
    world.until(world.job(), "succeeded")
    assert world.served == []


@pytest.mark.parametrize(
    ("error", "patience"),
    [(ServingError("no GPU is free"), FULL_ANSWER_SECONDS), (DoesNotStartError("out of memory"), ANSWER_SECONDS)],
)
def test_a_full_job_waits_hours_for_a_gpu_but_not_for_replicas_that_fail(world, error, patience):
    controller = world.controller()
    job = world.job()
    world.serving = error
    with pytest.raises(AssertionError, match=str(error)):
        world.until(job, "succeeded", controller)
    for seconds, state in ((patience - 60, "running"), (patience + 60, "failed")):
        world.clock.now = _published(world, job) + timedelta(seconds=seconds)
        controller.step()
        assert world.find(job).state == state
    failed = world.find(job).error
    assert failed["code"] == "model_does_not_answer" and str(error) in failed["message"]


def test_a_full_job_reports_once_what_its_model_waits_for_and_since_when(world):
    controller = world.controller()
    job = world.job()
    world.answer = ServingError("no replica")
    world.waits_for = "a node with 1 GPU free"
    with pytest.raises(AssertionError):
        world.until(job, "succeeded", controller)
    assert world.messages(job).count("The model waits for a node with 1 GPU free.") == 1
    world.clock.forward(90)
    assert status_details(world.find(job), world.clock()) == "Waits for a node with 1 GPU free; for 1m30s so far."
    world.waits_for = ""  # it has a place, and loads
    controller.step()
    assert "no replica" in status_details(world.find(job), world.clock())
    world.answer = None
    done = world.until(job, "succeeded", controller)
    assert done.waiting is None and status_details(done, world.clock()) is None


def test_a_full_job_that_waits_too_long_for_room_fails_with_what_it_waited_for(world):
    controller = world.controller()
    job = world.job()
    world.answer, world.waits_for = ServingError("no replica"), "a node with 1 GPU free"
    with pytest.raises(AssertionError):
        world.until(job, "succeeded", controller)
    world.clock.now = _published(world, job) + timedelta(seconds=FULL_ANSWER_SECONDS + 60)
    failed = world.until(job, "failed", controller)
    assert failed.error["message"].endswith("its replicas wait for a node with 1 GPU free")


def test_a_model_that_can_have_no_place_fails_its_job_after_minutes_but_a_node_may_come_back(world):
    controller = world.controller()
    job = world.job()
    world.answer = ServingError("no replica")
    with pytest.raises(AssertionError):
        world.until(job, "succeeded", controller)
    world.clock.forward(2 * ANSWER_SECONDS)  # it has waited for long when the node goes
    world.serving = NoRoomError("no node has room for its replica")
    controller.step()
    assert world.find(job).state == "running"
    world.serving = None  # the node is back
    controller.step()
    world.clock.forward(2 * ANSWER_SECONDS)
    world.serving = NoRoomError("no node has room for its replica")
    controller.step()
    assert world.find(job).state == "running"
    world.clock.forward(ANSWER_SECONDS + 1)
    failed = world.until(job, "failed", controller)
    assert failed.error["code"] == "cannot_be_served" and "no node has room" in failed.error["message"]


def test_a_full_job_is_cancelled_while_its_model_waits_for_room(world):
    controller = world.controller()
    job = world.job()
    world.answer, world.waits_for = ServingError("no replica"), "a node with 1 GPU free"
    with pytest.raises(AssertionError):
        world.until(job, "succeeded", controller)
    world.wish(job, "cancel")
    controller.step()
    assert world.find(job).state == "cancelled"
    assert world.records.parents_of([MODEL]) == {}  # so its application goes


def _published(world: World, job: Job) -> datetime:
    return RunFolder(world.storage, job.run_id).recorded_status().time


def test_a_controller_that_dies_before_the_model_answered_is_continued_without_training_again(world):
    job = world.job()
    world.serving = ServingError("not deployed yet")
    with pytest.raises(AssertionError):
        world.until(job, "succeeded", world.controller())
    world.clock.forward(60)
    world.serving = None
    world.until(job, "succeeded", world.controller())
    assert len(world.ray.submitted) == 1 and world.served == [MODEL]


# -- what is deployed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "is_served"), [("running", True), ("succeeded", True), ("failed", False), ("cancelled", False)]
)
def test_a_model_is_deployed_while_its_job_may_succeed(server, base_folder, tmp_path, state, is_served):
    record = publish(server, base_folder, tmp_path)
    apps = Deployed()
    servers = server.servers(apps)
    servers.step()
    assert apps.running == {}  # no job has published it
    job_of(server.world, record, state)
    servers.step()
    assert list(apps.running) == ([record.id] if is_served else [])
    assert bool(server.full.all()) is is_served


def test_a_model_is_served_as_its_parent_with_replicas_of_its_own(world, base_folder, tmp_path):
    server = Server(world, base_folder, replicas=2, max_batch=7, dtype="float32", pinned=["an-adapter"])
    record = publish(server, base_folder, tmp_path)
    job_of(world, record)
    settings = server.full.settings()[record.id]
    assert settings.base == world.storage.uri(f"models/{record.id}")
    assert (settings.model_name, settings.max_batch, settings.pinned) == (record.id, 7, ())
    assert settings.may_scale_to_zero and settings.autoscaling.max_replicas == 3
    automatic = Server(world, base_folder).full.settings()[record.id]
    assert automatic.dtype == "float32"  # as its parent's files say, whatever training computed in


def test_a_server_without_the_parent_does_not_serve_the_model(world, base_folder, server, tmp_path):
    record = publish(server, base_folder, tmp_path)
    job_of(world, record)
    other = Server(world, base_folder, base_name="another")
    apps = Deployed()
    other.servers(apps).step()
    assert apps.running == {} and other.full.find(record) is None
    with pytest.raises(ApiError, match="is not an adapter"):
        other.models.resolve(record.id)


def test_a_new_cluster_and_a_new_controller_deploy_every_model_again(server, base_folder, tmp_path):
    record = publish(server, base_folder, tmp_path)
    job_of(server.world, record)
    apps = Deployed()
    servers = server.servers(apps)
    servers.step()
    servers.step()
    assert apps.deployments == [record.id]
    apps.running.clear()  # somebody has deleted the application
    servers.step()
    assert apps.deployments == [record.id] * 2
    server.servers(apps).step()  # Serve keeps replicas whose settings are the same
    lost = Deployed()
    server.servers(lost).step()
    assert lost.running == apps.running


def test_other_settings_of_the_parent_are_deployed_by_the_next_controller(world, base_folder, server, tmp_path):
    record = publish(server, base_folder, tmp_path)
    job_of(world, record)
    apps = Deployed()
    server.servers(apps).step()
    Server(world, base_folder, max_batch=3).servers(apps).step()
    assert apps.running[record.id].max_batch == 3


def test_a_model_that_cannot_be_deployed_does_not_hold_up_the_others(server, base_folder, tmp_path, caplog):
    records = [publish(server, base_folder, tmp_path, name) for name in ("one", "two")]
    for digit, record in zip("ab", records, strict=True):
        job_of(server.world, record, digit=digit)
    apps = Deployed(refuses=records[0].id)
    servers = server.servers(apps)
    with caplog.at_level(logging.WARNING):
        servers.step()
    assert list(apps.running) == [records[1].id] and "no controller" in caplog.text
    apps.refuses = None
    servers.step()
    assert set(apps.running) == {record.id for record in records}


def test_ensure_says_whether_a_model_is_deployed_and_why_not(server, base_folder, tmp_path):
    record = publish(server, base_folder, tmp_path)
    apps = Deployed()
    servers = server.servers(apps)
    with pytest.raises(ServingError, match="is not a model of this server"):
        servers.ensure(record.id)
    job_of(server.world, record, "running")
    servers.ensure(record.id)
    assert list(apps.running) == [record.id]
    apps.problems[record.id] = AppStatus("CUDA out of memory")
    with pytest.raises(DoesNotStartError, match="CUDA out of memory"):
        servers.ensure(record.id)
    apps.problems[record.id] = AppStatus(is_unplaced=True)
    servers.ensure(record.id)
    assert servers.waits_for(record.id) == "a GPU"
    apps.problems.clear()
    assert servers.waits_for(record.id) == ""
    with pytest.raises(NoRoomError, match="there is no GPU"):
        server.servers(apps, problem="there is no GPU").ensure(record.id)
    apps.running.clear()
    with pytest.raises(ServingError, match="is not deployed yet"):
        servers.ensure(record.id)


def test_a_model_whose_replicas_serve_has_given_up_starts_again_after_longer_and_longer_times(
    server, base_folder, tmp_path
):
    """They may have failed because the storage was away."""
    record = publish(server, base_folder, tmp_path)
    job_of(server.world, record)
    apps = Deployed()
    servers = server.servers(apps)
    servers.step()
    apps.problems[record.id] = AppStatus("storage = '/mnt': does not answer", has_given_up=True)
    steps = []
    for _ in range(4):
        before = len(apps.deployments)
        steps.append(0)
        while len(apps.deployments) == before and steps[-1] < 100:
            servers.step()
            steps[-1] += 1
    assert steps[1:] == sorted(steps[1:]) and 2 * steps[1] < steps[-1] < 100
    apps.problems.clear()
    before = len(apps.deployments)
    for _ in range(200):
        servers.step()
    assert len(apps.deployments) == before


def test_the_applications_of_two_servers_are_told_apart():
    names = [application_of("ft", "tiny-a"), application_of("ft-2", "tiny-a"), "ft", "other"]
    assert applications_of("ft", names) == {"tiny-a": "ft.tiny-a"}
    assert applications_of("ft-2", names) == {"tiny-a": "ft-2.tiny-a"}


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_a_full_model_is_listed_with_parent_and_owner_under_all_its_names(server, base_folder, tmp_path):
    record = publish(server, base_folder, tmp_path)
    job = job_of(server.world, record)
    listed = {model.id: model.entry() for model in server.models.all()}
    assert list(listed) == ["tiny", record.id, job.alias]
    for name in (record.id, job.alias):
        entry = listed[name]
        assert (entry.parent, entry.root, entry.digest) == ("tiny", record.id, record.digest)
        model = server.models.resolve(name)
        assert model.base.name == record.id and model.adapter is None
        assert server.models.owners(model) == [("root", None)]
    assert server.models.all_owners() == {record.id: [("root", None)]}


def test_a_model_whose_files_are_gone_hides_no_other_one(server, base_folder, tmp_path, caplog):
    lost, kept = (publish(server, base_folder, tmp_path, name) for name in ("one", "two"))
    for digit, record in zip("ab", (lost, kept), strict=True):
        job_of(server.world, record, digit=digit)
    (server.models.registry.folder(lost) / "config.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert [record.id for record, _ in server.full.all()] == [kept.id]
    assert lost.id in caplog.text


def test_a_deleted_model_is_hidden_at_once_then_its_application_goes_then_its_files(server, base_folder, tmp_path):
    record = publish(server, base_folder, tmp_path)
    job = job_of(server.world, record)
    storage = server.world.storage
    apps = Deployed()
    servers = server.servers(apps)
    servers.step()
    settings = apps.running[record.id]
    ref = BaseModelRef(id=settings.base, revision=None, short_name=record.id, fingerprint="f")
    replica = Announcement(storage, ref)
    replica.start()
    with pytest.raises(UsageError, match="serves it"):
        delete_adapter(storage, record.id)  # from the command line
    delete_published(server.models, server.models.resolve(job.alias))
    for name in (job.alias, record.id):
        with pytest.raises(ApiError, match="does not exist"):
            server.models.resolve(name)
    assert [model.id for model in server.models.all()] == ["tiny"]
    servers.step()
    servers.step()
    assert apps.running == {} and storage.exists(f"models/{record.id}/config.json")
    replica.stop()
    servers.step()
    assert not storage.exists(f"models/{record.id}")
    with pytest.raises(NotPublishedError, match="was deleted"):
        server.models.registry.resolve(record.id)
    servers.step()
    assert not finish_deletion(storage, record.id).kept  # again, without effect


def test_the_files_of_a_deleted_model_go_although_its_application_is_gone_already(server, base_folder, tmp_path):
    record = publish(server, base_folder, tmp_path)
    job = job_of(server.world, record)
    apps = Deployed()
    servers = server.servers(apps)
    servers.step()
    apps.running.clear()
    delete_published(server.models, server.models.resolve(job.alias))
    servers.step()
    servers.step()
    assert not server.world.storage.exists(f"models/{record.id}")


DELETION_CALLS = {"write_json", "write_bytes", "delete", "delete_local_copy"}


def half_deleted(storage: Storage, model: str) -> None:
    """As a process leaves it that is killed while it deletes a folder."""
    (Path(storage.root) / "models" / model / "config.json").unlink()


def test_a_deletion_that_is_killed_anywhere_is_finished_by_the_next_controller(server, base_folder, tmp_path):
    """Deleting, ending the application and deleting files are killed before and after each of their calls."""
    storage = server.world.storage
    digits = map(chr, count(ord("a")))
    for number in range(1, 50):
        for when in ("before", "after"):
            record = publish(server, base_folder, tmp_path, f"{number}-{when}")
            job_of(server.world, record, digit=next(digits))
            apps = Deployed()
            server.servers(apps).step()
            calls: list[str] = []
            killed_storage = KilledAt(storage, DELETION_CALLS, number, when, calls)
            has_tombstone = was_killed = False
            try:
                hide_adapter(killed_storage, record.id)
                server.servers(apps, killed_storage).step()
                server.servers(apps, killed_storage).step()
            except Killed:
                was_killed = True
                has_tombstone = record.id in deleted_models(storage)
            if was_killed and not has_tombstone and storage.exists(f"models/{record.id}/record.json"):
                hide_adapter(storage, record.id)  # the client has had no answer, and asks again
            if storage.exists(f"models/{record.id}/config.json"):
                half_deleted(storage, record.id)
            apps.running.pop(record.id, None)  # the new cluster has forgotten it, too
            servers = server.servers(apps)
            for _ in range(3):
                servers.step()
            assert not storage.exists(f"models/{record.id}"), (number, when, calls)
            assert record.id not in apps.running
            with pytest.raises(NotPublishedError, match="was deleted"):
                server.models.registry.resolve(record.id)
        if not was_killed:
            break
    assert number > 5 and not was_killed


# -- before it spends --------------------------------------------------------------------------------------------------


def test_a_full_model_that_has_no_room_beside_its_cache_is_refused_with_the_cure():
    base = BaseSettings(base="meta-llama/Llama-3.1-8B-Instruct", gpus=1)
    shape = shape_of(base.base)
    assert full_model_problem(base, shape, 80) is None
    assert full_model_problem(base, shape, None) is None  # an unknown GPU is not checked
    assert full_model_problem(replace_gpus(base, 0), shape, 16) is None
    problem = full_model_problem(base, shape, 16)
    assert problem is not None and "llama-3.1-8b-instruct more GPUs" in problem and "ft plan --serve" in problem
    assert full_model_problem(replace_gpus(base, 4), shape, 16) is None


class Nodes:
    """The nodes of a cluster. See `ft_service.cluster.queue.capacity.ClusterNodes`."""

    id = "cluster-1"

    def __init__(self, *totals: Mapping[str, float], grows: bool = False) -> None:
        self._totals = totals
        self._grows = grows

    def nodes(self) -> list[Node]:
        return [Node(f"n{number}", total, total) for number, total in enumerate(self._totals)]

    def may_grow_beyond(self) -> bool:
        return self._grows

    def node_name(self, node_id: str) -> str:
        return node_id


GIB = 2**30


@pytest.mark.parametrize(
    ("base", "nodes", "problem"),
    [
        ({"gpus": 1}, Nodes({"GPU": 1, "CPU": 8}), r"no node has room for its replica \(1 GPU and 1 CPU\) beside"),
        ({"gpus": 1}, Nodes({"GPU": 1, "CPU": 8}, grows=True), None),
        ({"gpus": 1}, Nodes({"GPU": 2, "CPU": 8}), None),
        ({"gpus": 1}, Nodes({"GPU": 2, "CPU": 1}), "the largest of 1 node has 2 GPUs and 1 CPU"),
        ({"gpus": 1, "autoscaling": {"max_replicas": 1}}, Nodes({"GPU": 1, "CPU": 8}), None),
        ({"gpus": 1, "autoscaling": {"min_replicas": 1, "max_replicas": 1}}, Nodes({"GPU": 1, "CPU": 8}), "no node"),
        ({"gpus": 4}, Nodes({"GPU": 6, "CPU": 8}, {"GPU": 3, "CPU": 8}), "no node has room"),  # 5 GPUs, on two nodes
        ({"gpus": 2, "replicas": 2}, Nodes({"GPU": 4, "CPU": 8}, {"GPU": 2, "CPU": 8}), None),  # packed, one is free
        ({"gpus": 1, "cpus": 16}, Nodes({"GPU": 4, "CPU": 8}), "16 CPUs"),
        ({"gpus": 0}, Nodes({"CPU": 8, "memory": 4 * GIB}), "weights take 15.0 GiB on a node"),
        ({"gpus": 0}, Nodes({"CPU": 8, "memory": 24 * GIB}), None),
        ({"gpus": 0}, Nodes({"CPU": 8}), None),  # the autoscaler's types need not say their memory
        ({"gpus": 1}, Nodes({"GPU": 4, "CPU": 8, "accelerator_type:T4": 1}), "each of the replica's 1 GPU"),
        ({"gpus": 1}, Nodes({"GPU": 4, "CPU": 8, "accelerator_type:A100": 1}), None),
        ({}, Nodes({"CPU": 8, "memory": 24 * GIB}), None),  # no GPU in the cluster: bases take none
        ({"gpus": 1}, Nodes(), None),
    ],
)
def test_a_model_that_no_node_can_hold_beside_the_bases_is_a_problem(base, nodes, problem):
    settings = ServeSettings.model_validate(
        {"storage": "s", "bases": [{"base": "meta-llama/Llama-3.1-8B-Instruct", **base}], "fine_tuning": {}}
    )
    found = ServingRoom(settings, nodes).problem(settings.bases[0], shape_of(settings.bases[0].base))
    assert (found is None) if problem is None else re.search(problem, found or ""), found


def test_replicas_of_the_bases_that_are_short_of_room_themselves_are_no_reason_to_refuse():
    settings = ServeSettings.model_validate(
        {"bases": [{"base": "a", "gpus": 1}, {"base": "b", "gpus": 8}], "fine_tuning": {}}
    )
    small = settings.bases[0]
    assert ServingRoom(settings, Nodes({"GPU": 2, "CPU": 8})).problem(small) is None
    assert ServingRoom(settings, Nodes({"GPU": 1, "CPU": 8})).problem(small) is not None


@pytest.mark.parametrize(("method", "is_refused"), [("full", True), ("lora", False)])
def test_a_full_job_whose_model_has_no_room_is_refused_before_it_spends(base_folder, tmp_path, method, is_refused):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, chat_records(tmp_path, 30))))
    template = {
        "model": {"base": str(base_folder)},
        "method": {"type": method},
        "data": {"max_seq_len": 128},
        "parallel": {"use_gpu": False},
    }
    job = JobSettings(
        "tiny", 0, Hyperparameters(), str(tmp_path / "train.jsonl"), None, "an upload", "CC0-1.0", {}, None
    )
    served = BaseSettings(base=str(base_folder), name="tiny", max_context=10**12)
    settings = ServeSettings.model_validate({"bases": [served], "fine_tuning": {"gpu_type": "H100"}})
    problem = serving_problems(settings)("tiny")
    check = partial(check_job, template, job, str(tmp_path / "storage"), Resources(gpu_type="H100"), problem)
    if not is_refused:
        assert check().plan.num_steps > 0
        return
    with pytest.raises(JobRefusedError, match="has no room there") as refused:
        check()
    assert (refused.value.code, refused.value.param) == ("cannot_be_served", "model")


def replace_gpus(base: BaseSettings, gpus: int) -> BaseSettings:
    return base.model_copy(update={"gpus": gpus})
