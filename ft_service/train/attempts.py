"""Attempts: start a run's workers again and again until the run is complete, is stopped, or cannot continue.

    choose the number of workers -> plan -> start them -> watch -> trained | stopped | died or moved: try again

Workers leave on a request in the run's folder: they finish the step, save a checkpoint, and exit. A stop request ends
the run. A move request starts another attempt at once: when a node is draining, or when there is room for more workers.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ft_service.cluster.queue.turn import Turn
from ft_service.cluster.ray_cluster import (
    disconnect,
    draining_nodes,
    free_worker_slots,
    nodes_of_actors,
    num_actors,
    request_resources,
    this_node_id,
)
from ft_service.cluster.room import format_workers, room_per_worker
from ft_service.cluster.signals import StopSignals
from ft_service.errors import RunStopped, StorageError, TrainingError
from ft_service.plan.plan import RunPlan
from ft_service.runs.events import Event, EventLog, Hang, Notice, Recovering, TrainingStarted, WorkerPlace, read_events
from ft_service.runs.folder import Request, RunFolder, State
from ft_service.runs.lease import Lease, holds_lease
from ft_service.runs.metrics import read_last_metrics, read_metrics, seconds_left
from ft_service.runs.progress import Log
from ft_service.spec.schema import RunSpec
from ft_service.text import counted
from ft_service.train.checkpoints.manifest import Checkpoints
from ft_service.train.deaths import HANG_CURE, DeathReason, TrainingDied
from ft_service.train.watchdog import ranks_without_stacks
from ft_service.train.worker_group import WORKER, Controller, NoRoom, WorkerGroup

_POLL_SECONDS = 0.5
_REQUEST_SECONDS = 1.0
_DRAIN_SECONDS = 5.0
GROW_SECONDS = 5.0
"""Time between two checks for free resources. Workers are added when two checks in a row find room for them."""
SETTLE_SECONDS = 10.0
"""How long to wait for the largest number of workers to fit; Ray frees the resources of dead workers with a delay."""
_WAITING_SECONDS = 5.0
"""Time between two looks what a run waits for whose workers have not started."""
_LOG_WAITING_SECONDS = 60.0
_PLACED_SECONDS = 1.0
_ESTIMATE_SECONDS = 60.0
"""Time between two estimates of the end of the run, which other runs may wait for."""
_QUEUE_SECONDS = 5.0
"""Time between two looks whether a run of higher priority waits."""
_TRAINING: frozenset[State] = frozenset({"running", "checkpointing", "stopping"})
"""States in which workers have something to save before they leave."""


@dataclass(frozen=True)
class _Death:
    """Where and why an attempt died. Two equal deaths in a row are expected to happen a third time."""

    step: int | None
    """None: before its first step."""
    reason: DeathReason


class Attempts:
    """Trains a run to its end. `plan_for` makes the plan for a number of workers, and writes it to storage."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunFolder,
        plan_for: Callable[[int], RunPlan],
        lease: Lease,
        signals: StopSignals,
        log: Log,
        controller: Controller,
        turn: Turn,
    ) -> None:
        self._spec = spec
        self._run = run
        self._plan_for = plan_for
        # While workers run, storage that does not answer must not block the other checks.
        self._run_without_retries = RunFolder(run.storage.without_retries(), run.run_id)
        self._lease = lease
        self._signals = signals
        self._log = log
        self._controller = controller
        self._turn = turn
        self._events = EventLog(run.storage, run.run_id)
        self._worker_resources = room_per_worker(spec.parallel)
        self._worker_counts = spec.worker_counts()
        self._pending_request: Request | None = None
        self._fitting_count = 0
        self._is_storage_away = False
        self._checked_at: dict[str, float] = {}

    def train(self) -> RunPlan:
        """Returns the plan of the last attempt. Raises `RunStopped`, or `TrainingError` if the run cannot continue."""
        try:
            if self._run.has_outcome():
                plan = self._plan_for(self._worker_counts[-1])
                if self._run.is_trained(plan.training_digest):  # an earlier driver died before it could publish
                    return plan
            return self._train()
        finally:
            self._withdraw_resource_request()

    def _withdraw_resource_request(self) -> None:
        """Otherwise the autoscaler would keep the nodes for a run that waits or has ended.

        A failure here does not change how the run ends.
        """
        if len(self._worker_counts) > 1:
            try:
                request_resources(self._worker_resources, 0)
            except Exception as error:  # Ray raises many kinds
                count = self._worker_counts[0]
                self._log(f"Could not withdraw the request for {count} workers from the autoscaler: {error}")

    def _train(self) -> RunPlan:
        deaths: list[_Death] = []
        while True:
            plan = self._plan_for(self._choose_worker_count())
            num_started = len(self._training_starts())
            try:
                self._run_attempt(plan)
            except NoRoom:
                continue  # choose the number of workers again
            except TrainingDied as death:
                if self._pending_request is not None and self._pending_request.kind == "stop":
                    raise RunStopped(f"{self._pending_request.reason}. {death} {self._resume_hint()}") from death
                has_started = len(self._training_starts()) > num_started
                deaths.append(_Death(self._last_step() if has_started else None, death.reason))
                self._recover(death, deaths)
                continue
            if self._pending_request is None and not self._run.is_trained(plan.training_digest):
                self._check_requests()  # the workers may have seen a request, and left, before this driver looked
            if self._pending_request is not None and self._pending_request.kind == "stop":
                raise RunStopped(f"{self._pending_request.reason}. {self._resume_hint()}")
            if self._run.is_trained(plan.training_digest):
                return plan
            if self._pending_request is None:
                raise TrainingError(
                    f"run {self._run.run_id}: its workers exited without a result and without a request to leave."
                )
            message = f"{self._pending_request.reason}. Continuing from step {self._newest_step()}."
            self._report(Notice(type="moving", message=message))

    def _run_attempt(self, plan: RunPlan) -> None:
        earlier = self._run.request()
        if earlier is not None and earlier.kind == "stop":
            raise RunStopped(f"{earlier.reason}. {self._resume_hint()}")
        self._run.delete_requests("move")
        self._pending_request = None
        self._fitting_count = 0
        self._checked_at = {}
        count = plan.spec.parallel.max_workers
        self._run.set_state("queued", f"Waiting for {counted(count, 'worker')} to start.")
        group = WorkerGroup(plan, self._run, self._lease.token, self._controller)
        self._signals.may_wait = True
        try:
            while not group.wait(_POLL_SECONDS):
                self._check_attempt(plan)
        except RunStopped:
            self._withdraw_resource_request()
            group.end()
            disconnect()
            raise
        except BaseException:
            group.end()
            raise
        finally:
            self._signals.may_wait = False

    def _recover(self, death: TrainingDied, deaths: list[_Death]) -> None:
        """Report that the run starts again. Raises `TrainingError` after two equal deaths, or too many deaths."""
        newest_step = self._newest_step()
        max_failures = self._spec.parallel.max_failures
        traceback = self._write_traceback(death)
        hang = self._hang_details()
        died = f"{str(death).rstrip('.')}.{hang}"
        cure = HANG_CURE if hang else death.reason.cure
        if len(deaths) > max_failures:
            used_up = f" All {max_failures} restarts (parallel.max_failures) are used up." if max_failures else ""
            raise TrainingError(f"{died}{used_up} {cure}{traceback}") from death
        if len(deaths) > 1 and deaths[-1] == deaths[-2]:
            where = "before its first step" if deaths[-1].step is None else f"after step {deaths[-1].step}"
            repeated = f"The run died twice {where} for the same reason."
            raise TrainingError(f"{died} {repeated} {cure}{traceback}") from death
        self._run.set_state("recovering", message=str(death))
        message = f"{died} Starting again from step {newest_step}.{traceback}"
        self._report(Recovering(message=message, step=newest_step, failures=len(deaths)))

    def _write_traceback(self, death: TrainingDied) -> str:
        """Keep the library's traceback in the run's folder; returns the sentence that names the file."""
        if not death.traceback:
            return ""
        try:
            return f" Traceback: {self._run.write_traceback(death.traceback)}"
        except StorageError as error:
            return f" Its traceback is in the log only ({error})."

    # -- while workers run -----------------------------------------------------------------------------------------

    def _check_attempt(self, plan: RunPlan) -> None:
        """Check once for everything that can end an attempt. Raises `RunStopped` to end it at once."""
        count = plan.spec.parallel.max_workers
        try:
            if self._signals.received and not self._is_stopping():
                self._send_request(Request(kind="stop", reason=f"{self._signals.received} received"))
            if self._is_due("request", _REQUEST_SECONDS):
                self._check_requests()
            if self._is_due("drain", _DRAIN_SECONDS):
                self._check_draining_nodes()
            if count < self._worker_counts[0] and self._is_due("grow", GROW_SECONDS):
                self._check_free_resources(count)
            if not self._turn.is_placed and self._is_due("placed", _PLACED_SECONDS):
                self._record_places(plan)
            if self._turn.is_placed and self._is_due("estimate", _ESTIMATE_SECONDS):
                self._estimate_end(plan)
            if self._pending_request is None and self._is_due("queue", _QUEUE_SECONDS) and self._turn.must_leave():
                self._send_request(Request(kind="move", reason="A waiting run of higher priority needs the workers"))
            is_logged = self._is_due("log waiting", _LOG_WAITING_SECONDS)
            if is_logged or (not self._turn.is_placed and self._is_due("waiting", _WAITING_SECONDS)):
                self._report_waiting(count, is_logged)
            self._is_storage_away = False
        except StorageError as error:
            if not self._is_storage_away:
                self._log(f"Cannot read the state of the run: {error}")
            self._is_storage_away = True

    def _check_queued(self) -> None:
        """Check once for what ends a run that waits in the queue. Raises `RunStopped`."""
        try:
            self._check_requests()
            self._check_draining_nodes()
        except StorageError as error:
            self._log(f"Cannot read the state of the run: {error}")
        if self._pending_request is not None and self._is_stopping():
            raise RunStopped(f"{self._pending_request.reason}. {self._resume_hint()}")

    def _record_places(self, plan: RunPlan) -> None:
        """Tell the queue where the workers are, once all of them have started."""
        nodes = nodes_of_actors(WORKER)
        if len(nodes) == plan.spec.parallel.max_workers:
            self._turn.placed(nodes, plan.estimate.seconds if plan.estimate else None)

    def _estimate_end(self, plan: RunPlan) -> None:
        steps = read_last_metrics(self._run_without_retries.storage, self._run.run_id)
        if (seconds := seconds_left(steps, plan.num_steps)) is not None:
            self._turn.expect_end(seconds)

    def _check_requests(self) -> None:
        if not holds_lease(self._run_without_retries, self._lease.token):
            raise RunStopped(f"Another driver has taken over run {self._run.run_id}. This driver leaves it.")
        request = self._run_without_retries.request()
        if request is not None and request.now:
            raise RunStopped(f"{request.reason}. {self._resume_hint()}")
        is_new_stop = request is not None and request.kind == "stop" and not self._is_stopping()
        if request is not None and (self._pending_request is None or is_new_stop):
            self._pending_request = request
            self._handle_request(request)

    def _send_request(self, request: Request) -> None:
        earlier = self._run.request()
        if earlier is None or earlier.kind != "stop":  # an earlier stop request may have `now` set
            self._run.write_request(request)
        self._pending_request = request
        self._handle_request(request)

    def _handle_request(self, request: Request) -> None:
        is_training = self._run.recorded_state() in _TRAINING
        if request.kind == "stop" and not is_training:
            raise RunStopped(f"{request.reason}. {self._resume_hint()}")
        if request.kind == "stop":
            self._run.set_state("stopping", request.reason)
        message = f"{request.reason}: finishing the current step and saving a checkpoint."
        self._report(Notice(type="stopping" if request.kind == "stop" else "leaving", message=message))
        if request.kind == "stop":
            self._log("A second Ctrl-C or SIGTERM, or `ft stop --now`, ends it at once.")

    def _check_draining_nodes(self) -> None:
        draining = draining_nodes()
        if not draining or self._pending_request is not None:
            return
        if this_node_id() in draining:
            self._send_request(Request(kind="stop", reason="The node of the job's driver is draining"))
        elif draining & {place.node for place in self._worker_places()}:
            self._send_request(Request(kind="move", reason="A node of the run is draining"))

    def _check_free_resources(self, count: int) -> None:
        """Move to more workers, in one of the allowed numbers, when two checks in a row find room for them."""
        if self._pending_request is not None or not self._worker_places() or not self._turn.may_grow():
            return
        limit = count + free_worker_slots(self._worker_resources)
        fitting = next((more for more in self._worker_counts if count < more <= limit), 0)
        if fitting and fitting == self._fitting_count:
            self._send_request(Request(kind="move", reason=f"There is room for {fitting} workers instead of {count}"))
        self._fitting_count = fitting

    def _report_waiting(self, count: int, is_logged: bool) -> None:
        """Say what the run waits for while it is queued. Ray starts a worker's process once all of them have room.

        The status has it until the first worker writes there.
        """
        status = self._run_without_retries.recorded_status()
        if status is None or status.state != "queued":
            return
        workers = num_actors(WORKER)
        if workers.living == count:
            message = status.message  # of the first worker
        elif workers.starting or workers.living:
            message = f"Waiting for Ray to start the processes of {count} workers; {workers.living} have started."
        else:
            if (slots := free_worker_slots(self._worker_resources)) < count:
                needed = format_workers(count, self._worker_resources)
                message = f"Waiting for room for {needed}; there is room for {slots}."
            else:
                message = f"There is room for {counted(count, 'worker')}; waiting for Ray Train to start them."
            if message != status.message:
                self._run_without_retries.write_status(status.model_copy(update={"message": message}))
        if is_logged:
            self._log(message)

    def _hang_details(self) -> str:
        """What is known about the workers that hung, if the newest attempt ended that way."""
        events = read_events(self._run.storage, self._run.run_id)
        newest = next((event for event in reversed(events) if isinstance(event, TrainingStarted | Hang)), None)
        if not isinstance(newest, Hang):
            return ""
        ranks = ranks_without_stacks(self._run, newest.attempt, self._run.plan().spec.parallel.max_workers)
        suspects = f" No stacks from workers {', '.join(map(str, ranks))}: check these first." if ranks else ""
        return f" {newest.message}{suspects}"

    # -- facts -----------------------------------------------------------------------------------------------------

    def _choose_worker_count(self) -> int:
        if not self._turn.has_begun:
            self._withdraw_resource_request()
        most = self._turn.take(self._check_queued)
        if len(self._worker_counts) == 1:
            return self._worker_counts[0]
        request_resources(self._worker_resources, self._worker_counts[0])
        deadline = time.monotonic() + SETTLE_SECONDS
        while (slots := min(free_worker_slots(self._worker_resources), most)) < most:
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_SECONDS)
        return next((count for count in self._worker_counts if count <= slots), self._worker_counts[-1])

    def _is_stopping(self) -> bool:
        return self._pending_request is not None and self._pending_request.kind == "stop"

    def _is_due(self, check: str, every_seconds: float) -> bool:
        now = time.monotonic()
        first = now if every_seconds > _REQUEST_SECONDS else 0.0
        if now - self._checked_at.setdefault(check, first) < every_seconds:
            return False
        self._checked_at[check] = now
        return True

    def _training_starts(self) -> list[TrainingStarted]:
        events = read_events(self._run.storage, self._run.run_id)
        return [event for event in events if isinstance(event, TrainingStarted)]

    def _worker_places(self) -> list[WorkerPlace]:
        """Where the workers of this attempt run; empty before they train."""
        starts = self._training_starts()
        if self._run.recorded_state() != "running" or not starts:
            return []
        return starts[-1].workers

    def _last_step(self) -> int:
        metrics = read_metrics(self._run.storage, self._run.run_id)
        return metrics[-1].step if metrics else 0

    def _newest_step(self) -> int:
        entries = Checkpoints(self._run).entries()
        return entries[-1].step if entries else 0

    def _resume_hint(self) -> str:
        return f"Stopped at step {self._newest_step()}. Continue with: ft resume {self._run.run_id}"

    def _report(self, event: Event) -> None:
        """Record the event, and show its message to the person."""
        self._events.emit(event)
        self._log(event.message)
