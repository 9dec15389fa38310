"""Attempts: a run trains on the workers there are until it is complete, is stopped, or cannot be helped.

    choose workers -> plan -> start them -> look after them -> trained | stopped | died, or moved: once more

All that makes workers go is one request on storage: they finish the step, save a checkpoint, and leave. A person's stop
ends the run then; when a node is about to be taken away, or more workers have found room, the run goes on at once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ft_service.cluster.ray_cluster import ask_for_room, disconnect, draining_nodes, free_slots, this_node
from ft_service.cluster.signals import StopSignals
from ft_service.errors import RunStopped, StorageError, TrainingError
from ft_service.plan.plan import RunPlan
from ft_service.runs.folder import Request, RunFolder, State
from ft_service.runs.lease import Lease, holds
from ft_service.runs.metrics import Event, EventLog, read_events, read_metrics
from ft_service.spec.schema import RunSpec
from ft_service.train.checkpoints.manifest import Checkpoints
from ft_service.train.watchdog import suspects
from ft_service.train.worker_group import NoRoom, TrainingDied, WorkerGroup, resources_per_worker

Say = Callable[[str], None]

_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 1.0
_DRAIN_SECONDS = 5.0
GROW_SECONDS = 5.0
"""How often it is looked for room; workers are added when there is room twice in a row."""
SETTLE_SECONDS = 10.0
"""How long a range of workers is waited for to be whole, before a run goes on with fewer: the dead free their room."""
_TELL_WAITING_SECONDS = 60.0
_TRAINING: frozenset[State] = frozenset({"running", "checkpointing", "stopping"})
"""There is something to be saved before the workers go."""


@dataclass(frozen=True)
class _Death:
    """Where an attempt died; None: before it had made a step. Twice the same will happen a third time."""

    step: int | None
    cause: str


class Attempts:
    """Trains a run to its end. `plan_for` decides the plan for a number of workers, and leaves it on storage."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunFolder,
        plan_for: Callable[[int], RunPlan],
        lease: Lease,
        signals: StopSignals,
        say: Say,
    ) -> None:
        self._spec, self._run, self._plan_for = spec, run, plan_for
        self._seen = RunFolder(run.storage.without_patience(), run.run_id)  # to look at while there is more to look at
        self._lease, self._signals, self._say = lease, signals, say
        self._events = EventLog(run.storage, run.run_id)
        self._needs = resources_per_worker(spec.parallel)
        if spec.parallel.accelerator_type:
            self._needs[f"accelerator_type:{spec.parallel.accelerator_type}"] = 0.001  # as Ray Train asks for it
        self._counts = spec.worker_counts()
        self._asked: Request | None = None
        self._room_seen, self._is_away = 0, False
        self._looked: dict[str, float] = {}

    def train(self) -> RunPlan:
        """Returns the plan of the last attempt. Raises `RunStopped`, or `TrainingError` when it cannot be helped."""
        try:
            if len(self._counts) > 1:
                ask_for_room(self._needs, self._counts[0])
            return self._train()
        finally:
            self._ask_for_no_more_room()

    def _ask_for_no_more_room(self) -> None:
        """The autoscaler would keep the nodes for ever; but whether it hears of it or not, a run ends as it ends."""
        if len(self._counts) > 1:
            try:
                ask_for_room(self._needs, 0)
            except Exception as error:  # Ray raises many kinds
                self._say(f"The autoscaler could not be told that {self._counts[0]} workers need no room: {error}")

    def _train(self) -> RunPlan:
        deaths: list[_Death] = []
        while True:
            plan = self._plan_for(self._choose_workers())
            if self._run.is_trained(plan.training_digest):  # an earlier driver died before it could publish
                return plan
            _refuse_another_course(self._run, plan)
            began = len(self._trainings())
            try:
                self._attempt(plan)
            except NoRoom:
                continue  # by now there may be another number of workers to choose
            except TrainingDied as death:
                if self._asked is not None and self._asked.kind == "stop":
                    raise RunStopped(f"{self._asked.reason}. {death} {self._how_to_go_on()}") from death
                deaths.append(_Death(self._last_step() if len(self._trainings()) > began else None, death.cause))
                self._recover(death, deaths)
                continue
            if self._asked is not None and self._asked.kind == "stop":
                raise RunStopped(f"{self._asked.reason}. {self._how_to_go_on()}")
            if self._run.is_trained(plan.training_digest):
                return plan
            if self._asked is None:
                raise TrainingError(f"run {self._run.run_id}: its workers ended without a result, unasked.")
            self._tell("moving", f"{self._asked.reason}. Going on from step {self._newest_step()}.")

    def _attempt(self, plan: RunPlan) -> None:
        waiting = self._run.request()
        if waiting is not None and waiting.kind == "stop":
            raise RunStopped(f"{waiting.reason}. {self._how_to_go_on()}")
        self._run.forget_requests("move")
        self._asked, self._room_seen, self._looked = None, 0, {}
        count = plan.spec.parallel.most_workers
        self._run.enter("queued", f"Waits for {count} workers and their base model.")
        group = WorkerGroup(plan, self._run, self._lease.token)
        self._signals.may_wait = True
        try:
            while not group.wait(_POLL_SECONDS):
                self._look_after(count)
        except RunStopped:
            self._ask_for_no_more_room()
            group.end()
            disconnect()
            raise
        except BaseException:
            group.end()
            raise
        finally:
            self._signals.may_wait = False

    def _recover(self, death: TrainingDied, deaths: list[_Death]) -> None:
        """Say that the run goes on; raises `TrainingError` when it would only die again, or too often."""
        reached, budget = self._newest_step(), self._spec.parallel.max_failures
        if len(deaths) > budget:
            cure = f" Its {budget} restarts (parallel.max_failures) are used up." if budget else ""
            raise TrainingError(f"{death}{cure}") from death
        if len(deaths) > 1 and deaths[-1] == deaths[-2]:
            where = "before its first step" if deaths[-1].step is None else f"after step {deaths[-1].step}"
            cure = "Look at the log of that worker; a smaller train.micro_batch_size if it ran out of memory."
            raise TrainingError(f"{death} It died twice {where} in the same way. {cure}") from death
        self._run.enter("recovering", message=str(death))
        message = f"{death}{self._hang()} Starting again from step {reached}."
        self._tell("recovering", message, step=reached, failures=len(deaths))

    # -- while they train ------------------------------------------------------------------------------------------

    def _look_after(self, count: int) -> None:
        """One look at everything that may end an attempt; raises `RunStopped` to end it at once."""
        try:
            if self._signals.received and not self._is_stopping():
                self._ask(Request(kind="stop", reason=f"{self._signals.received} received"))
            if self._is_due("request", _REQUEST_SECONDS):
                self._look_for_requests()
            if self._is_due("drain", _DRAIN_SECONDS):
                self._look_for_draining_nodes()
            if count < self._counts[0] and self._is_due("grow", GROW_SECONDS):
                self._look_for_room(count)
            if self._is_due("waiting", _TELL_WAITING_SECONDS):
                self._tell_waiting(count)
            self._is_away = False
        except StorageError as error:
            if not self._is_away:
                self._say(f"Looking after the run: {error}")
            self._is_away = True

    def _look_for_requests(self) -> None:
        if not holds(self._seen, self._lease.token):
            raise RunStopped(f"Another driver has taken over run {self._run.run_id}; this one leaves it alone.")
        request = self._seen.request()
        if request is not None and request.now:
            raise RunStopped(f"{request.reason}. {self._how_to_go_on()}")
        if request is not None and (self._asked is None or (request.kind == "stop" and not self._is_stopping())):
            self._asked = request
            self._note_leaving(request)

    def _ask(self, request: Request) -> None:
        earlier = self._run.request()
        if earlier is None or earlier.kind != "stop":  # which may say that it shall be at once
            self._run.ask(request)
        self._asked = request
        self._note_leaving(request)

    def _note_leaving(self, request: Request) -> None:
        is_training = self._run.recorded_state() in _TRAINING
        if request.kind == "stop" and not is_training:
            raise RunStopped(f"{request.reason}. {self._how_to_go_on()}")
        if request.kind == "stop":
            self._run.enter("stopping", request.reason)
        message = f"{request.reason}: the step under way is finished, and a checkpoint saved."
        self._tell("stopping" if request.kind == "stop" else "leaving", message)
        if request.kind == "stop":
            self._say("Once more (Ctrl-C, SIGTERM, or ft stop --now) ends it at once.")

    def _look_for_draining_nodes(self) -> None:
        going = draining_nodes()
        if not going or self._asked is not None:
            return
        if this_node() in going:
            self._ask(Request(kind="stop", reason="The node of the job's driver is being taken away"))
        elif going & {place.get("node") for place in self._places()}:
            self._ask(Request(kind="move", reason="A node of the run is being taken away"))

    def _look_for_room(self, count: int) -> None:
        """More workers, in number one of those allowed, when there was room for them at two looks in a row."""
        if self._asked is not None or not self._places():
            return
        room = next((more for more in self._counts if count < more <= count + free_slots(self._needs)), 0)
        if room and room == self._room_seen:
            self._ask(Request(kind="move", reason=f"There is room for {room} workers instead of {count}"))
        self._room_seen = room

    def _tell_waiting(self, count: int) -> None:
        if self._run.recorded_state() == "queued" and free_slots(self._needs) == 0:  # otherwise they are loading
            self._say(f"Waiting for room for {count} workers ({_readable(self._needs)} each).")

    def _hang(self) -> str:
        """What is known of the workers that stood still, if that was how the newest attempt ended."""
        events = read_events(self._run.storage, self._run.run_id)
        newest = next((event for event in reversed(events) if event.type in ("training", "hang")), None)
        if newest is None or newest.type != "hang":
            return ""
        attempt = newest.model_dump()["stacks"].rpartition("/")[2]
        silent = suspects(self._run, attempt, self._run.plan().spec.parallel.most_workers)
        stuck = f" No stacks came from {', '.join(map(str, silent))}: look there first." if silent else ""
        return f" {newest.message}{stuck}"

    # -- facts -----------------------------------------------------------------------------------------------------

    def _choose_workers(self) -> int:
        if len(self._counts) == 1:
            return self._counts[0]
        deadline = time.monotonic() + SETTLE_SECONDS
        while (room := free_slots(self._needs)) < self._counts[0] and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return next((count for count in self._counts if count <= room), self._counts[-1])

    def _is_stopping(self) -> bool:
        return self._asked is not None and self._asked.kind == "stop"

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now - self._looked.setdefault(what, now if every > _REQUEST_SECONDS else 0.0) < every:
            return False
        self._looked[what] = now
        return True

    def _trainings(self) -> list[Event]:
        return [event for event in read_events(self._run.storage, self._run.run_id) if event.type == "training"]

    def _places(self) -> list[dict[str, str]]:
        """Where the workers of this attempt are; empty before they train."""
        trainings = self._trainings()
        if self._run.recorded_state() != "running" or not trainings:
            return []
        workers: list[dict[str, str]] = trainings[-1].model_dump()["workers"]
        return workers

    def _last_step(self) -> int:
        metrics = read_metrics(self._run.storage, self._run.run_id)
        return metrics[-1].step if metrics else 0

    def _newest_step(self) -> int:
        entries = Checkpoints(self._run).entries()
        return entries[-1].step if entries else 0

    def _how_to_go_on(self) -> str:
        return f"Stopped at step {self._newest_step()}; `ft resume {self._run.run_id}` goes on."

    def _tell(self, type: str, message: str, **data: object) -> None:
        self._events.emit(type, message, **data)
        self._say(message)


def _refuse_another_course(run: RunFolder, plan: RunPlan) -> None:
    """Before workers are asked for; they themselves compare too, with the checkpoint that they take."""
    checkpoints = Checkpoints(run)
    for entry in reversed(checkpoints.entries()):
        try:
            training_digest = checkpoints.manifest(entry).training_digest
        except (StorageError, ValueError):
            continue  # damaged: the workers take the one before
        if training_digest != plan.training_digest:
            raise TrainingError(
                f"--run-id = {run.run_id!r}: its checkpoints are of another model, method, data or schedule than the "
                "spec. Give another --run-id, or the spec it began with."
            )
        return


def _readable(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount >= 1)
