"""Jobs are driven to their end whatever is killed, and nothing is started twice."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ft_service.cluster.submit import Submission
from ft_service.errors import ClusterError, DatabaseError, ServingError, UnreachableError
from ft_service.runs.folder import Request, RunFolder
from serve.fine_tuning.checks import JobRefusedError
from serve.fine_tuning.job_files import JobFolder, delete_ended_data
from serve.fine_tuning.job_records import CREATE_WINDOW, request_digest
from serve.fine_tuning.job_states import ENDED, LEGAL, check_legal
from serve.fine_tuning.waiting import PREPARATION, waiting_reply
from tests.cluster.queue.queue_cases import entry
from tests.serve.fine_tuning.job_world import BODY, STEPS, World, make_world


@pytest.fixture
def world(tmp_path) -> World:
    return make_world(tmp_path)


def steps_reported(world: World, job) -> list[int]:
    events = world.records.events_since(job.id, None, 1000)
    return [event.data["step"] for event in events if event.type == "metrics"]


def test_a_job_goes_through_its_states_and_succeeds_only_after_its_model_has_answered(world):
    job = world.job()
    controller = world.controller()
    world.until(job, "queued", controller)
    world.until(job, "running", controller)
    assert world.asked == []
    done = world.until(job, "succeeded", controller)
    assert world.asked == [done.alias, "tiny-run-ffffffff"] and done.adapter == "tiny-run-0a1b2c3d"
    assert world.ray.submitted == [f"{job.run_id}.1"]
    assert steps_reported(world, job) == [1, 2, 3, 4]
    assert done.trained_tokens == 10 * STEPS and done.finished is not None
    assert world.result_files[done.result_files[0]].decode().splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,2.000000,0.125000,,",
        "2,1.000000,0.250000,,",
        "3,0.666667,0.375000,,",
        "4,0.500000,0.500000,1.500000,0.250000",
    ]
    assert world.messages(job)[-3:] == [
        "Step 4/4: training loss=0.5000, validation loss=1.5000",
        f"New fine-tuned model created: {job.alias}",
        "The job has successfully completed",
    ]
    checkpoints, more = world.records.list_checkpoints(job.id, 10)
    assert [(one.step, one.alias) for one in checkpoints] == [
        (4, f"{job.alias}:ckpt-step-4"),
        (2, f"{job.alias}:ckpt-step-2"),
    ]
    assert not more
    assert world.records.adapter_of(f"{job.alias}:ckpt-step-2") == "tiny-run-ffffffff"
    assert world.records.adapter_of(f"{job.alias}:ckpt-step-4") == world.records.adapter_of(job.alias) == done.adapter
    assert set(world.records.aliases()) == {job.alias, *(f"{job.alias}:ckpt-step-{step}" for step in (2, 4))}


def test_a_model_that_does_not_answer_is_no_success(world):
    job = world.job()
    world.answer = ServingError("no replica")
    controller = world.controller()
    with pytest.raises(AssertionError, match="no replica"):
        world.until(job, "succeeded", controller)
    assert world.find(job).state == "running" and not world.records.aliases()
    world.answer = None
    world.until(job, "succeeded", controller)
    other = world.job("b")
    world.answer = ServingError("no replica")
    with pytest.raises(AssertionError):
        world.until(other, "succeeded", controller)
    world.clock.now = world.clock.now.replace(year=2036)
    controller.step()
    failed = world.find(other)
    assert failed.state == "failed" and failed.error["code"] == "model_does_not_answer"
    assert "no replica" in failed.error["message"] and "tiny-run-0a1b2c3d is published" in failed.error["message"]


def test_a_job_whose_files_are_refused_fails_with_the_reasons(world):
    world.refusal = JobRefusedError("invalid_training_file", "training_file:3: no answer", "training_file")
    failed = world.until(world.job(), "failed")
    assert failed.error == {
        "code": "invalid_training_file",
        "message": "training_file:3: no answer",
        "param": "training_file",
    }
    assert world.ray.submitted == []


def test_a_run_that_fails_fails_its_job_with_the_reason_of_the_run(world):
    world.ray.finishes = "failed"
    failed = world.until(world.job(), "failed")
    assert failed.error["code"] == "training_failed" and "loss is nan" in failed.error["message"]


def test_a_driver_that_ends_before_its_run_began_fails_the_job(world):
    job = world.job()
    controller = world.controller()
    world.until(job, "queued", controller)
    controller.step()
    world.ray.submissions[f"{job.run_id}.1"] = "failed"
    controller.step()
    failed = world.find(job)
    assert failed.error == {"code": "driver_failed", "message": "the driver printed this", "param": None}


def test_a_lost_head_resubmits_under_the_same_run_id(world):
    job = world.job()
    controller = world.controller()
    world.until(job, "running", controller)
    world.ray.lose_head()
    world.until(job, "succeeded", controller)
    assert world.ray.submitted == [f"{job.run_id}.1", f"{job.run_id}.2"]
    assert world.ray.trained == [(job.run_id, step) for step in (1, 2, 3, 4)]
    assert any("submitted again" in message for message in world.messages(job))
    assert steps_reported(world, job) == [1, 2, 3, 4]


def test_a_head_that_is_shut_down_and_stops_the_run_resubmits_it(world):
    """Its drivers get SIGTERM, and save a checkpoint."""
    job = world.job()
    controller = world.controller()
    world.until(job, "running", controller)
    RunFolder(world.storage, job.run_id).write_request(Request(kind="stop", reason="SIGTERM received"))
    world.ray.advance()
    assert RunFolder(world.storage, job.run_id).recorded_state() == "stopped"
    world.ray.lose_head()
    world.until(job, "succeeded", controller)
    assert world.ray.submitted == [f"{job.run_id}.1", f"{job.run_id}.2"]
    assert steps_reported(world, job) == [1, 2, 3, 4]


def test_a_head_lost_before_the_driver_began_resubmits_the_same_attempt(world):
    job = world.job()
    controller = world.controller()
    world.until(job, "queued", controller)
    controller.step()
    world.ray.lose_head()
    world.until(job, "succeeded", controller)
    assert world.ray.submitted == [f"{job.run_id}.1"] * 2  # the first is forgotten by a new head


def test_while_ray_does_not_answer_a_job_waits_and_says_why(world):
    job = world.job()

    class Away:
        def find(self, submission_id: str) -> Submission:
            raise ClusterError("Ray does not answer.")

        def submit(self, *arguments: str) -> None:
            raise ClusterError("Ray does not answer.")

    away = world.controller(launcher=Away())
    for _ in range(4):
        away.step()
    waiting = world.find(job)
    assert waiting.state == "queued" and waiting.trouble == "Ray does not answer."
    assert sum("Held up" in message for message in world.messages(job)) == 1
    away.release()
    done = world.until(job, "succeeded")
    assert done.trouble is None and len(set(world.ray.submitted)) == len(world.ray.submitted)


def test_while_storage_is_away_a_job_waits_and_then_goes_on(world, monkeypatch):
    job = world.job()
    controller = world.controller()
    world.until(job, "running", controller)

    def is_away(run: RunFolder) -> None:
        raise UnreachableError("/mnt/ft: does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "recorded_status", is_away)
        for _ in range(5):
            controller.step()
        waiting = world.find(job)
        assert waiting.state == "running" and waiting.trouble == "/mnt/ft: does not answer."
    world.until(job, "succeeded", controller)
    assert world.ray.submitted == [f"{job.run_id}.1"] and steps_reported(world, job) == [1, 2, 3, 4]


def test_a_failure_of_one_job_does_not_hold_up_the_others(world, monkeypatch):
    broken = world.job("a")
    healthy = world.job("b")
    complete = JobFolder.complete

    def fails(self: JobFolder, job) -> None:
        if job.id == broken.id:
            raise RuntimeError("a bug")
        complete(self, job)

    monkeypatch.setattr(JobFolder, "complete", fails)
    controller = world.controller()
    world.until(healthy, "succeeded", controller)
    assert world.find(broken).state == "validating_files" and "a bug" in world.find(broken).trouble


def test_a_job_that_waits_in_the_queue_reports_its_place_and_when_it_will_be_done(world):
    job = world.job()
    controller = world.controller()
    world.until(job, "queued", controller)
    controller.step()
    world.ray.advance()
    start = world.clock()
    waiting_run = entry(
        job.run_id,
        driver="t",
        arrival=start,
        since=start,
        worker_resources={"GPU": 1.0},
        expected_seconds=60,
        place=2,
        waits_for="1 GPU, which run other-1 has",
        estimated_start=start,
    )
    path = f"queue/clusters/c/{waiting_run.file}"
    world.storage.write_json(path, waiting_run.model_dump(mode="json"))
    for place in (2, 2, 1):
        waiting_run = waiting_run.model_copy(update={"place": place})
        world.storage.write_json(path, waiting_run.model_dump(mode="json"))
        controller.step()
    waiting = world.find(job)
    assert waiting.state == "queued" and (waiting.estimated_finish - start).total_seconds() == 60
    assert waiting.waiting == {
        "place": 1,
        "waits_for": "1 GPU, which run other-1 has",
        "estimated_start": int(start.timestamp()),
    }
    assert [message for message in world.messages(job) if message.startswith("Place")] == [
        "Place 2 in the queue of the cluster; waits for 1 GPU, which run other-1 has.",
        "Place 1 in the queue of the cluster; waits for 1 GPU, which run other-1 has.",
    ]
    world.storage.delete(path)
    done = world.until(job, "succeeded", controller)
    assert done.trouble is None and done.waiting is None


def test_a_run_whose_driver_prepares_says_so_and_its_end_is_planned_before_it_is_measured(world):
    world.seconds = 90.0
    job = world.job()
    controller = world.controller()
    world.until(job, "queued", controller)
    controller.step()
    world.ray.advance()
    controller.step()
    preparing = world.find(job)
    assert preparing.state == "queued" and preparing.waiting["waits_for"] == "its data to be prepared"
    world.ray.advance()
    controller.step()
    running = world.find(job)
    assert running.state == "running" and running.waiting is None and running.last_step == 1
    assert (running.estimated_finish - world.clock()).total_seconds() == 90
    world.ray.advance()
    controller.step()
    assert world.find(job).estimated_finish != running.estimated_finish  # at the measured pace


# -- pause, resume, cancel -------------------------------------------------------------------------------------------


def test_pause_stops_with_a_checkpoint_and_resume_goes_on(world):
    job = world.job()
    controller = world.controller()
    world.until(job, "running", controller)
    world.wish(job, "pause")
    paused = world.until(job, "paused", controller)
    assert paused.wish is None and 0 < paused.last_step < STEPS
    trained = list(world.ray.trained)
    controller.step()
    world.ray.advance()
    assert world.ray.trained == trained  # no GPU is used
    assert world.records.change(paused, "queued", attempt=paused.attempt + 1) is not None
    world.until(job, "succeeded", controller)
    assert world.ray.submitted == [f"{job.run_id}.1", f"{job.run_id}.2"]
    assert [step for _, step in world.ray.trained] == [1, 2, 3, 4]


@pytest.mark.parametrize("looks", range(6))
def test_a_wish_is_fulfilled_whenever_it_comes(world, looks):
    """At each point between submission and training, a driver that has just started included."""
    job = world.job()
    controller = world.controller()
    world.until(job, "queued", controller)
    controller.step()
    for _ in range(looks):
        world.ray.advance()
        if looks % 2:
            controller.step()
    if world.find(job).state == "succeeded":
        return
    world.wish(job, "cancel")
    finished = RunFolder(world.storage, job.run_id).recorded_state() == "succeeded"
    world.until(job, "succeeded" if finished else "cancelled", controller)
    assert not [name for name, state in world.ray.submissions.items() if state in ("pending", "running")]


def test_a_run_that_somebody_stopped_is_a_paused_job(world):
    job = world.job()
    controller = world.controller()
    world.until(job, "running", controller)
    RunFolder(world.storage, job.run_id).write_request(Request(kind="stop", reason="ft stop"))
    world.until(job, "paused", controller)
    assert any("stopped from outside" in message for message in world.messages(job))


# -- killed anywhere -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


class KilledAt:
    """Passes calls on until the one of a number, which is lost (`before`) or whose answer is (`after`)."""

    def __init__(self, inner: object, names: set[str], number: int, when: str, calls: list[str]) -> None:
        self._inner = inner
        self._names = names
        self._number = number
        self._when = when
        self._calls = calls

    def __getattr__(self, name: str):
        found = getattr(self._inner, name)
        if name not in self._names:
            return found

        def call(*arguments: object, **options: object) -> object:
            self._calls.append(name)
            is_now = len(self._calls) == self._number
            if is_now and self._when == "before":
                raise Killed
            result = found(*arguments, **options)
            if is_now:
                raise Killed
            return result

        return call


def drive(world: World, number: int, when: str, head_is_lost: bool) -> bool:
    """Run a job to its end with the first controller killed at a call. Returns whether it was killed."""
    job = world.job()
    calls: list[str] = []
    records = KilledAt(world.records, {"change", "take_lease"}, number, when, calls)
    launcher = KilledAt(world.ray, {"submit", "find", "stop"}, number, when, calls)
    controller = world.controller(records, launcher)
    killed = False
    try:
        world.until(job, "succeeded", controller)
    except Killed:
        killed = True
        world.clock.forward(60)  # its lease expires
        if head_is_lost:
            world.ray.lose_head()
        world.until(job, "succeeded")
    done = world.find(job)
    assert steps_reported(world, job) == [1, 2, 3, 4]
    assert [step for _, step in world.ray.trained] == [1, 2, 3, 4]
    assert len(world.result_files) == len(done.result_files) == 1
    assert len(world.records.due_webhooks(10)) == 1
    messages = world.messages(job)
    for message in ("Files validated, moving job to queued state", "The job has successfully completed"):
        assert messages.count(message) == 1
    if not head_is_lost:
        assert world.ray.submitted == [f"{job.run_id}.1"]
    return killed


@pytest.mark.parametrize("head_is_lost", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_controller_killed_at_any_call_loses_nothing_and_starts_nothing_twice(tmp_path, when, head_is_lost):
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        if not drive(make_world(folder), number, when, head_is_lost):
            break
    assert number > 25  # so many calls were tried


def test_a_database_that_is_away_for_a_while_loses_nothing(world):
    job = world.job()
    fails = iter([False, True] * 60)

    class Flaky:
        def __getattr__(self, name: str):
            if name in ("change", "take_lease", "active") and next(fails, False):
                raise DatabaseError("FT_DATABASE_URL: the database failed (it is locked).")
            return getattr(world.records, name)

    controller = world.controller(records=Flaky())
    for _ in range(200):
        try:
            controller.step()
        except DatabaseError:
            continue
        world.ray.advance()
        if world.find(job).state == "succeeded":
            break
    assert world.find(job).state == "succeeded" and world.ray.submitted == [f"{job.run_id}.1"]
    assert steps_reported(world, job) == [1, 2, 3, 4]


def test_of_two_controllers_one_acts_and_the_other_takes_over(world):
    job = world.job()
    first = world.controller()
    second = world.controller()
    assert first.step() and not second.step()
    world.clock.forward(29)
    assert first.step() and not second.step()
    world.clock.forward(31)
    assert second.step() and not first.step()
    second.release()
    assert first.step()
    world.until(job, "succeeded", first)


# -- creating --------------------------------------------------------------------------------------------------------


def test_the_same_request_gets_the_same_job_within_the_window(world):
    job = world.job()
    digest = request_digest("a", BODY)
    again = world.records.create(world_job_like(world, job, "b"), digest)
    assert again.id == job.id and world.records.find_created(digest).id == job.id
    world.clock.forward(CREATE_WINDOW.total_seconds() + 1)
    later = world.records.create(world_job_like(world, job, "c"), digest)
    assert later.id != job.id
    assert world.records.change(later, "cancelled") is not None
    after_cancel = world.records.create(world_job_like(world, job, "d"), digest)
    assert after_cancel.id not in (job.id, later.id)


def world_job_like(world: World, job, digit: str):
    job_hex = digit * 24
    names = {"id": f"ftjob-{job_hex}", "run_id": f"tiny-{job_hex[:12]}", "alias": f"ft:tiny:ft::{job_hex[:8]}"}
    return replace(job, **names, created=world.clock())


def test_identical_requests_at_once_create_one_job(world):
    template = world.job("0")
    drafts = [world_job_like(world, template, digit) for digit in "123456789abcdef"]
    with ThreadPoolExecutor(len(drafts)) as pool:
        created = list(pool.map(lambda draft: world.records.create(draft, "one digest").id, drafts))
    assert len(set(created)) == 1
    assert len(world.records.active()) == 2


# -- states ----------------------------------------------------------------------------------------------------------


def test_ended_jobs_change_no_more_and_illegal_transitions_raise(world):
    assert all(not LEGAL[state] for state in ENDED)
    with pytest.raises(ValueError, match="succeeded cannot become running"):
        check_legal("succeeded", "running")
    job = world.job()
    with pytest.raises(ValueError):
        world.records.change(job, "succeeded")
    assert world.records.change(job, "cancelled") is not None
    assert world.records.change(job, "queued") is None  # it is no longer what it was


def test_a_running_job_whose_run_was_preempted_waits_until_it_trains_again(world):
    controller = world.controller()
    job = world.job()
    world.until(job, "running", controller)
    run = RunFolder(world.storage, job.run_id)
    run.set_state("queued")
    controller.step()
    preempted = world.find(job)
    assert preempted.state == "running" and waiting_reply(preempted).waits_for == PREPARATION
    for kept in ({"place": 1, "waits_for": ""}, {"place": 1, "waits_for": "room for 1 worker"}):
        world.records.change(world.find(job), waiting=kept)
        assert waiting_reply(world.find(job)).waits_for == (kept["waits_for"] or "its turn in the queue")
    run.set_state("running")
    controller.step()
    assert waiting_reply(world.find(job)) is None
    world.until(job, "succeeded", controller)


# -- what ended jobs leave -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [False, True])
def test_links_to_data_that_a_killed_controller_has_left_are_deleted_by_the_next_one(world, monkeypatch, away):
    job = world.job()
    data = f"jobs/{job.id}/data/{job.training_file}"
    world.storage.write_bytes(data, b"{}")
    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "delete_data", lambda *_: None)  # killed, or the storage is away, just then
        world.until(job, "succeeded")
    assert world.records.ended_with_data() == [job.id]
    root = Path(world.storage.root)
    if away:  # it is not mounted: an empty folder is no sign that the data are gone
        root.rename(root.with_name("away"))
        root.mkdir()
        delete_ended_data(world.records, world.storage)
        root.rmdir()
        root.with_name("away").rename(root)
        assert world.storage.exists(data)
    delete_ended_data(world.records, world.storage)
    assert not world.storage.exists(f"jobs/{job.id}/data") and world.records.ended_with_data() == []
    assert world.storage.exists(f"jobs/{job.id}/job.json")


def test_the_data_of_jobs_that_have_not_ended_stay(world):
    job = world.job()
    delete_ended_data(world.records, world.storage)
    assert world.records.ended_with_data() == []
    world.until(job, "succeeded")
    assert world.records.ended_with_data() == []
