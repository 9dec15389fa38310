"""When a run is tried again, when not, and on how many workers. Workers are scripted; storage is real."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ft_service.cluster.queue.schedule import Node
from ft_service.cluster.queue.turn import Turn
from ft_service.cluster.ray_cluster import NumActors
from ft_service.cluster.signals import StopSignals
from ft_service.errors import RunStopped, TrainingError
from ft_service.plan.plan import RunPlan
from ft_service.runs.events import EventLog, Hang, TrainingStarted, WorkerPlace, read_events
from ft_service.runs.folder import Outcome, Request, RunFolder
from ft_service.runs.lease import Lease
from ft_service.runs.metrics import JsonlSink, StepMetrics
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from ft_service.train import attempts as attempts_module
from ft_service.train.attempts import Attempts
from ft_service.train.deaths import DeathReason, TrainingDied, reason_line
from ft_service.train.worker_group import Controller, NoRoom
from tests.cluster.queue.queue_cases import FakeCluster

DIGEST = "d" * 64


@dataclass
class Scripted:
    """One attempt: it trains to `step` (None: it never starts), and then calls `end`."""

    step: int | None
    end: Callable[[RunFolder], None]


def complete(run: RunFolder) -> None:
    run.write_outcome(
        Outcome(
            weights="weights/step-4",
            steps=4,
            steps_run=4,
            final_loss=1.0,
            validation_loss=None,
            stopped_early=False,
            base_fingerprint="f",
            training_digest=DIGEST,
        )
    )


def die(exception: str) -> Callable[[RunFolder], None]:
    def end(run: RunFolder) -> None:
        raise TrainingDied(f"worker 1 failed: {exception}", DeathReason("worker", exception))

    return end


def request(kind: str) -> Callable[[RunFolder], None]:
    def end(run: RunFolder) -> None:
        run.write_request(Request(kind=kind, reason="a request"))  # type: ignore[arg-type]

    return end


def leave(run: RunFolder) -> None:
    pass


@dataclass
class Plan:
    """What `Attempts` needs of one."""

    spec: RunSpec
    training_digest: str = DIGEST
    num_steps: int = 20
    estimate: Any = None


@dataclass
class World:
    run: RunFolder
    script: list[Scripted] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    room: int = 8
    cluster: FakeCluster = field(default_factory=lambda: FakeCluster(living=[Node("n", {"CPU": 8.0}, {"CPU": 8.0})]))
    actors: NumActors = field(default_factory=lambda: NumActors(0, 0))
    """Workers that Ray has."""
    logged: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    """What the driver ended, in this order."""
    is_saving: Callable[[], bool] = lambda: False
    while_queued: Callable[[], None] = lambda: None
    """Called at each look at the requests while the run waits in the queue."""

    def spec(self, queue: Any = None, **parallel: Any) -> RunSpec:
        return RunSpec.model_validate(
            {
                "name": "r",
                "model": {"base": "b"},
                "data": {"train": [{"path": "p"}]},
                "parallel": {"use_gpu": False, "num_workers": 2, **parallel},
                "queue": queue or {},
                "storage": self.run.storage.root,
            }
        )

    def train(self, is_saving: Callable[[], bool] = lambda: False, **settings: Any) -> RunPlan:
        """`is_saving` returns whether the workers have not left yet, although they are asked to."""
        self.is_saving = is_saving
        spec = self.spec(**settings)

        def plan_for(count: int) -> Any:
            self.counts.append(count)
            return Plan(spec.with_workers(count))

        log = self.logged.append
        with (
            Lease(self.run, log) as lease,
            StopSignals() as signals,
            Turn(self.run, spec, {"CPU": 1.0}, lease.token, self.cluster, log) as turn,
        ):
            attempts = Attempts(spec, self.run, plan_for, lease, signals, log, Controller(spec.parallel), turn)
            check = attempts._check_queued
            attempts._check_queued = lambda: (check(), self.while_queued())[0]  # type: ignore[method-assign]
            return attempts.train()

    def events(self) -> list[str]:
        return [event.type for event in read_events(self.run.storage, self.run.run_id) if event.type != "training"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    found = World(RunFolder(Storage(str(tmp_path)), "r"))

    class Group:
        def __init__(self, plan: Any, run: RunFolder, driver: str, controller: Controller) -> None:
            self._scripted = found.script.pop(0)
            if self._scripted.step is not None:
                log = JsonlSink(run.storage, run.run_id)
                log.rewind(0)
                log(measured(self._scripted.step))
                ranks = range(plan.spec.parallel.max_workers)
                workers = [WorkerPlace(host="h", pid=rank, node="n") for rank in ranks]
                EventLog(run.storage, run.run_id).emit(TrainingStarted(message="", step=0, workers=workers))
                run.set_state("running")

        def wait(self, seconds: float) -> bool:
            self._scripted.end(found.run)
            if found.is_saving():
                return False
            if found.run.request() is not None and self._scripted.end is not leave:
                self._scripted = Scripted(None, leave)  # it leaves after a request
                return False
            return True

        def end(self) -> None:
            found.ended.append("workers")

    monkeypatch.setattr(attempts_module, "WorkerGroup", Group)
    monkeypatch.setattr(attempts_module, "free_worker_slots", lambda needs: found.room)
    monkeypatch.setattr(attempts_module, "nodes_of_actors", lambda class_name: [])
    monkeypatch.setattr(attempts_module, "num_actors", lambda class_name: found.actors)
    monkeypatch.setattr(attempts_module, "request_resources", lambda needs, count: None)
    monkeypatch.setattr(attempts_module, "draining_nodes", set)
    monkeypatch.setattr(attempts_module, "disconnect", lambda: found.ended.append("Ray"))
    monkeypatch.setattr(attempts_module, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)  # no other driver starts in these tests
    yield found


def measured(step: int) -> StepMetrics:
    figures = dict.fromkeys(
        ("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib"), 1.0
    )
    return StepMetrics(step=step, tokens=1, loss_tokens=1, **figures)  # type: ignore[arg-type]


def test_a_run_recovers_from_deaths_at_different_steps(world: World) -> None:
    world.script = [Scripted(10, die("A")), Scripted(12, die("A")), Scripted(12, die("B")), Scripted(20, complete)]
    assert world.train(max_failures=3).training_digest == DIGEST
    assert world.events() == ["recovering"] * 3


def test_the_same_death_twice_at_one_step_ends_the_run(world: World) -> None:
    world.script = [
        Scripted(10, die("A")),
        Scripted(12, die("OutOfMemoryError")),
        Scripted(12, die("OutOfMemoryError")),
    ]
    with pytest.raises(TrainingError, match=r"died twice after step 12 for the same reason.*micro_batch_size"):
        world.train(max_failures=9)


def raised(exception: str, text: str) -> Callable[[RunFolder], None]:
    def end(run: RunFolder) -> None:
        reason = DeathReason("worker", exception, text)
        raise TrainingDied(f"worker 1 failed: {exception}: {text}", reason, f"Traceback of {exception}")

    return end


@pytest.mark.parametrize(
    ("exception", "text", "cure"),
    [
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", "memory of the GPU.*micro_batch_size"),
        ("OutOfMemoryError", "Task was killed due to the node running low on memory.", "main memory of the node"),
        ("RuntimeError", "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough", "main memory"),
        ("OSError", "[Errno 28] No space left on device", "disk is full"),
        ("ModuleNotFoundError", "No module named 'bitsandbytes'", "same packages on all nodes"),
        ("RuntimeError", "Error building extension 'cpu_adam'", "could not compile an operator"),
        ("FileNotFoundError", "[Errno 2] No such file or directory: '/data/base'", "Every node must be able to read"),
        ("UnreachableError", "s3://bucket: timed out", "does not answer that node"),
        ("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp", "NCCL_SOCKET_IFNAME"),
        ("AcceleratorError", "CUDA error: an illegal memory access was encountered", "nvidia-smi"),
        ("ActorDiedError", "The actor died unexpectedly", "out-of-memory killer"),
        ("KeyError", "'rope_type'", "Read the traceback.*please report it"),
    ],
)
def test_the_cure_of_a_repeated_death_follows_its_cause(world: World, exception: str, text: str, cure: str) -> None:
    world.script = [Scripted(12, raised(exception, text)), Scripted(12, raised(exception, text))]
    with pytest.raises(TrainingError, match=rf"died twice after step 12 for the same reason\. .*{cure}") as failed:
        world.train(max_failures=9)
    assert exception in str(failed.value)
    if "memory" not in cure:
        assert "micro_batch_size" not in str(failed.value)
    files = sorted(Path(world.run.storage.root, world.run.path, "tracebacks").iterdir())
    assert [file.read_text() for file in files] == [f"Traceback of {exception}"] * 2
    assert str(failed.value).endswith(f"Traceback: {files[1]}")


def test_the_cure_of_a_hang_is_about_its_stacks(world: World) -> None:
    def hang(run: RunFolder) -> None:
        event = Hang(message="Worker 0 hung.", rank=0, step=12, doing="", stacks="runs/r/stacks/a")
        EventLog(run.storage, run.run_id).emit(event)
        raised("ActorDiedError", "The actor died unexpectedly")(run)

    class Planned:
        spec = RunSpec.model_validate(
            {"name": "r", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}, "storage": "s"}
        )

    world.run.plan = lambda: Planned()  # type: ignore[method-assign, assignment, return-value]
    world.script = [Scripted(12, hang), Scripted(12, hang)]
    with pytest.raises(TrainingError, match=r"died twice after step 12 .*Compare the stacks .*hang_timeout_seconds"):
        world.train(max_failures=9)


def test_a_dead_process_is_reported_with_how_it_ended() -> None:
    text = "The actor died unexpectedly before finishing this task.\n\tpid: 7\nWorker exit detail: killed by SIGKILL."
    assert reason_line(ValueError(text)) == (
        "ValueError: The actor died unexpectedly before finishing this task. killed by SIGKILL."
    )


def test_the_same_death_twice_before_the_first_step_ends_the_run(world: World) -> None:
    world.script = [Scripted(10, die("A")), Scripted(None, die("A")), Scripted(None, die("A"))]
    with pytest.raises(TrainingError, match="died twice before its first step"):
        world.train(max_failures=9)


@pytest.mark.parametrize("budget", [0, 2])
def test_no_more_restarts_than_the_budget(world: World, budget: int) -> None:
    world.script = [Scripted(10 + number, die("A")) for number in range(budget + 1)]
    with pytest.raises(TrainingError, match=rf"{budget} restarts \(parallel.max_failures\)" if budget else "worker 1"):
        world.train(max_failures=budget)
    assert world.script == []


def test_a_preempted_run_saves_waits_for_its_turn_and_continues(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of a run of higher priority need the room; that run ends while this one waits."""
    monkeypatch.setattr(attempts_module, "_QUEUE_SECONDS", 0.0)
    monkeypatch.setattr(attempts_module, "nodes_of_actors", lambda class_name: ["n", "n"])
    monkeypatch.setattr("ft_service.cluster.queue.turn.time.sleep", lambda seconds: None)
    monkeypatch.setattr("ft_service.runs.lease._has_ended", lambda holder: False)
    other = RunFolder(world.run.storage, "other")
    spec = world.spec(num_workers=8, queue={"priority": "high", "owner": "eve"})

    def come(run: RunFolder) -> None:
        if high._entry is None:
            with pytest.raises(StopIteration):
                high.take(lambda: next(iter(())))

    looks: list[str] = []

    def look() -> None:
        state = world.run.recorded_state()
        looks.append(str(state))
        if len(looks) == 1:
            assert high.take(lambda: None) == 8
            high.placed(["n"] * 8, None)
        elif len(looks) == 3:
            high.leave()

    world.script = [Scripted(5, come), Scripted(9, complete)]
    world.while_queued = look
    with Lease(other, world.logged.append) as lease:
        high = Turn(other, spec, {"CPU": 1.0}, lease.token, world.cluster, world.logged.append)
        is_asked = world.run.request
        world.train(
            is_saving=lambda: not world.run.has_outcome() and is_asked() is None,
            queue={"preemptible": True, "owner": "ann"},
        )
    assert world.events() == ["leaving", "moving", "queued", "queued"]  # second, and then first
    assert world.counts == [2, 2] and looks == ["queued"] * 3


def test_a_training_error_is_not_retried(world: World) -> None:
    def refuse(run: RunFolder) -> None:
        raise TrainingError("step 3: the loss is nan.")

    world.script = [Scripted(3, refuse), Scripted(9, complete)]
    with pytest.raises(TrainingError, match="the loss is nan"):
        world.train()
    assert len(world.script) == 1


def test_a_stop_ends_the_run_and_a_move_continues_it(world: World) -> None:
    world.script = [Scripted(5, request("move")), Scripted(9, request("move")), Scripted(12, request("stop"))]
    with pytest.raises(RunStopped, match=r"a request.*ft resume r"):
        world.train(max_failures=0)
    assert world.events() == ["leaving", "moving", "leaving", "moving", "stopping"]


@pytest.mark.parametrize("kind", ["stop", "move"])
def test_workers_may_leave_on_a_request_before_the_driver_has_seen_it(
    world: World, monkeypatch: pytest.MonkeyPatch, kind: Literal["stop", "move"]
) -> None:
    monkeypatch.setattr(attempts_module, "_REQUEST_SECONDS", 1e9)
    world.script = [Scripted(5, request(kind)), Scripted(9, complete)]
    if kind == "stop":
        with pytest.raises(RunStopped, match=r"a request.*ft resume r"):
            world.train(max_failures=0)
        assert world.events() == ["stopping"]
    else:
        world.train(max_failures=0)
        assert world.events() == ["leaving", "moving"]


def test_a_stop_during_a_move_waits_for_the_checkpoint(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts_module, "_REQUEST_SECONDS", 0.0)
    looks = 0

    def be_moved_then_stopped(run: RunFolder) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            run.write_request(Request(kind="move", reason="a node goes"))
        elif looks == 2:
            run.set_state("checkpointing")  # the first worker saves what it leaves with
            run.write_request(Request(kind="stop", reason="a request"))

    world.script = [Scripted(5, be_moved_then_stopped)]
    with pytest.raises(RunStopped, match="a request"):
        world.train(is_saving=lambda: looks < 3)
    assert looks == 3 and world.events() == ["leaving", "stopping"]


def test_no_room_means_another_choice_and_not_a_failure(world: World) -> None:
    def no_room(run: RunFolder) -> None:
        world.room = 2
        raise NoRoom("timed out")

    world.script = [Scripted(None, no_room), Scripted(5, complete)]
    world.train(num_workers={"min": 2, "max": 8}, max_failures=0)
    assert world.counts == [8, 2] and "recovering" not in world.events()


def test_a_move_never_replaces_a_stop(world: World) -> None:
    run = world.run
    run.write_request(Request(kind="stop", reason="a person", now=True))
    run.write_request(Request(kind="move", reason="a node goes"))
    asked = run.request()
    assert asked is not None and (asked.kind, asked.now) == ("stop", True)
    run.delete_requests("move")
    assert run.request() == asked


def test_workers_that_die_during_a_stop_stay_dead(world: World) -> None:
    def asked_and_dead(run: RunFolder) -> None:
        if run.request() is None:
            run.write_request(Request(kind="stop", reason="a request"))
        else:
            raise TrainingDied("worker 0 failed: killed", DeathReason("worker", "A"))

    world.script = [Scripted(5, asked_and_dead)]
    with pytest.raises(RunStopped):
        world.train()


def test_a_stop_between_two_attempts_is_obeyed(world: World) -> None:
    def die_and_be_stopped(run: RunFolder) -> None:
        run.write_request(Request(kind="stop", reason="a request"))
        raise TrainingDied("worker 1 failed", DeathReason("worker", "A"))

    world.script = [Scripted(5, die_and_be_stopped)]
    with pytest.raises(RunStopped, match="a request"):
        world.train()


def test_a_trained_but_unpublished_run_needs_no_workers(world: World) -> None:
    complete(world.run)
    assert world.train().training_digest == DIGEST


def test_workers_that_exit_unasked_without_a_result_fail_the_run(world: World) -> None:
    world.script = [Scripted(5, leave)]
    with pytest.raises(TrainingError, match="without a result"):
        world.train()


@pytest.mark.parametrize(("room", "count"), [(8, 8), (9, 8), (7, 4), (4, 4), (3, 2), (0, 2)])
def test_a_range_uses_the_most_workers_that_fit(world: World, room: int, count: int) -> None:
    world.room = room
    world.script = [Scripted(5, complete)]
    world.train(num_workers={"min": 2, "max": 8})
    assert world.counts == [count]


def test_a_replaced_driver_leaves_the_run(world: World) -> None:
    def be_taken_over(run: RunFolder) -> None:
        run.storage.write_json(
            f"{run.path}/lease.json",
            {"token": "t", "host": "h", "machine": "m", "pid": 1, "time": "2100-01-01T00:00:00Z"},
        )
        run.write_request(Request(kind="move", reason="so that the driver looks once more"))

    world.script = [Scripted(5, be_taken_over)]
    with pytest.raises(RunStopped, match="Another driver has taken over"):
        world.train()
    assert world.ended == ["workers", "Ray"]


def test_an_error_in_the_driver_ends_its_workers_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> set[str]:
        raise RuntimeError("Ray knows nothing of its nodes")

    monkeypatch.setattr(attempts_module, "draining_nodes", fail)
    monkeypatch.setattr(attempts_module, "_DRAIN_SECONDS", 0.0)
    world.script = [Scripted(5, leave)]
    with pytest.raises(RuntimeError, match="knows nothing"):
        world.train(is_saving=lambda: True)
    assert world.ended == ["workers"]


@pytest.mark.parametrize(
    ("room", "actors", "message"),
    [
        (1, NumActors(0, 0), "Waiting for room for 2 workers with 1 CPU each; there is room for 1."),
        (2, NumActors(0, 0), "There is room for 2 workers; waiting for Ray Train to start them."),
        (0, NumActors(1, 1), "Waiting for Ray to start the processes of 2 workers; 1 have started."),
        (0, NumActors(0, 2), "2 workers started; loading the base."),
    ],
)
def test_the_log_and_status_of_a_queued_run_say_what_it_waits_for(
    world: World, monkeypatch: pytest.MonkeyPatch, room: int, actors: NumActors, message: str
) -> None:
    monkeypatch.setattr(attempts_module, "_WAITING_SECONDS", 0.0)
    monkeypatch.setattr(attempts_module, "_LOG_WAITING_SECONDS", 0.0)
    world.room = room
    world.actors = actors

    def load(run: RunFolder) -> None:
        if actors.living == 2:
            run.set_state("queued", "2 workers started; loading the base.")  # as the first worker does

    world.script = [Scripted(None, load)]
    polls = iter((True, False))
    with pytest.raises(TrainingError, match="without a result"):
        world.train(is_saving=lambda: next(polls))
    assert world.logged == [message]
    status = world.run.recorded_status()
    are_starting = actors.starting > 0  # then the first worker may write the status at any time
    assert status is not None and status.message == ("Waiting for 2 workers to start." if are_starting else message)
