"""Checkpoints: everything needed to resume, written beside training, and believed only when it is whole.

    runs/<id>/checkpoints/index.json                                 which ones there are, oldest first
    runs/<id>/checkpoints/step-000050-1a2b3c4d/part-00000-of-00002.safetensors   what one worker wrote
                                               part-00000-of-00002.json          its digest, and what lies where
                                               manifest.json                     written last: all parts, and the state

A part holds, for each shard of a trained parameter that its worker writes, the fp32 weight and Adam's two moments; and
the worker's random state. Frozen weights are never written. Because shards have names, and places in the parameter of
that name, any number of workers under any ZeRO stage finds in the parts what it needs, and reads just those bytes.

A checkpoint that is not in the index does not exist; the index names it once its manifest, and so every part, is there.
Only where there is no index, or a damaged one, do the manifests themselves count.

A save that fails leaves the index, and what it names, as they are.
"""

import hashlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import FtError, StorageError, TrainingError, UnreachableError
from ft_service.model.shards import Span
from ft_service.model.writer import DTYPE_NAMES, TensorFormat, WeightFile, WeightWriter
from ft_service.runs.events import (
    CheckpointDamaged,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointsKeepFailing,
    Event,
    EventLog,
    OldCheckpointsLeft,
)
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import CheckpointSpec
from ft_service.storage.retry import RUN_RETRY_SECONDS
from ft_service.storage.storage import Storage
from ft_service.text import format_duration
from ft_service.train.optimizer_state import KINDS
from ft_service.train.protocol import TrainingState

if TYPE_CHECKING:  # the driver looks checkpoints up too, and has no use for deepspeed
    from ft_service.train.parallel import Parallel

COMMIT_TIMEOUT_SECONDS = 1800.0
"""How long the first worker waits for the parts of the others."""
ALARMING_FAILURES = 3
"""Saves failed in a row after which it is said how much is at stake; and again each time their number has doubled."""
_POLL_SECONDS = 0.2
_STUCK_SECONDS = RUN_RETRY_SECONDS + COMMIT_TIMEOUT_SECONDS
"""Nothing that waits for storage, or for another worker's part, waits longer than that by intention."""
_FP32 = 4
_HASH_CHUNK_BYTES = 8 * 1024 * 1024


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredShard(_File):
    """Elements [start, stop) of a parameter: its kinds lie one after the other from byte `at` of the part's file."""

    start: int
    stop: int
    at: int


class Part(_File):
    """What one worker wrote (part-*.json)."""

    file: str
    bytes: int
    sha256: str
    shards: dict[str, StoredShard]
    rng_offset: int = Field(description="Byte where the worker's random state begins.")
    rng_bytes: dict[str, int] = Field(description="Its generators, in order, and their lengths.")


class Manifest(_File):
    """A whole checkpoint (manifest.json)."""

    # Before the first validation the best loss is infinite, which would come back as null.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    step: int
    adam_step: int
    state: dict[str, Any] = Field(description="The loop's TrainingState.")
    weights: str = Field(description="The best weights so far, below the run's folder; '' before there are any.")
    training_digest: str = Field(
        description="Digest of what decides the course of the training; see RunPlan.training_digest."
    )
    created: datetime
    parts: list[Part]

    def training_state(self) -> TrainingState:
        return TrainingState(**self.state)


class _Entry(_File):
    folder: str
    step: int
    weights: str
    sha256: str = Field(description="Of the manifest.")


class _Index(_File):
    checkpoints: list[_Entry] = []


class Checkpoints:
    """A run's checkpoints on storage. Every method is called by the first worker alone unless it says otherwise."""

    def __init__(self, run: RunFolder) -> None:
        self.storage: Storage = run.storage
        self.path = f"{run.path}/checkpoints"

    def entries(self) -> list[_Entry]:
        """What there is, oldest first."""
        return self.look()[0]

    def newest_step(self) -> int:
        """0 before there is any."""
        return max((entry.step for entry in self.entries()), default=0)

    def look(self) -> tuple[list[_Entry], str]:
        """What there is, oldest first, and what is wrong with the index; '' if nothing is.

        Without a sound index it is found by the manifests. Raises `StorageError` when a damaged index is all there is.
        """
        file = f"{self.path}/index.json"
        if self.storage.exists(file):
            try:
                return _Index.model_validate_json(self.storage.read_bytes(file)).checkpoints, ""
            except ValidationError:
                problem = f"{self.storage.uri(file)}: damaged."
        else:
            problem = f"{self.storage.uri(file)}: is gone."
        found = self._by_manifests()
        if not found and self.storage.exists(file):
            raise StorageError(
                f"{problem} No checkpoint beside it is whole. Give another --run-id, or delete the file."
            )
        return found, problem if found else ""

    def _by_manifests(self) -> list[_Entry]:
        found = []
        for folder in self.storage.folders(self.path):
            file = f"{self.path}/{folder}/manifest.json"
            if self.storage.exists(file):
                content = self.storage.read_bytes(file)
                with suppress(ValidationError):
                    manifest = Manifest.model_validate_json(content)
                    found.append((manifest.step, manifest.created, _entry(folder, manifest, content)))
        return [entry for *_, entry in sorted(found, key=lambda item: item[:2])]

    def manifest(self, entry: _Entry) -> Manifest:
        """Raises `StorageError` if it is gone or not what the index names."""
        content = self.storage.read_bytes(f"{self.path}/{entry.folder}/manifest.json")
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise StorageError(f"{self.storage.uri(self.path)}/{entry.folder}/manifest.json: damaged.")
        return Manifest.model_validate_json(content)

    def damaged(self, folder: str, part: Part, on_progress: Callable[[], None] = lambda: None) -> str:
        """What is wrong with a part on storage; '' if nothing is. Any worker may ask. It can take long.

        Raises `UnreachableError` when that cannot be told.
        """
        path = f"{self.path}/{folder}/{part.file}"
        try:
            digest = hashlib.sha256()
            for start in range(0, part.bytes, _HASH_CHUNK_BYTES):
                digest.update(self.storage.read_range(path, start, min(_HASH_CHUNK_BYTES, part.bytes - start)))
                on_progress()
            size = self.storage.size(path)
        except UnreachableError:
            raise
        except StorageError as error:
            return str(error)
        if size != part.bytes:
            return f"{self.storage.uri(path)}: {size:,} bytes instead of {part.bytes:,}."
        return "" if digest.hexdigest() == part.sha256 else f"{self.storage.uri(path)}: its bytes have changed."

    def commit(self, folder: str, manifest: Manifest) -> None:
        content = manifest.model_dump_json(indent=2).encode()
        self.storage.write_bytes(f"{self.path}/{folder}/manifest.json", content)
        # Those of a later step are of a course that was given up for an earlier checkpoint.
        kept = [other for other in self.entries() if other.step < manifest.step]
        self._write([*kept, _entry(folder, manifest, content)])

    def discard(self, folder: str) -> None:
        """Delete what is left of a save that failed; one that counts all the same stays."""
        if folder not in {entry.folder for entry in self.entries()}:
            self.storage.delete(f"{self.path}/{folder}")

    def forget_all_but(self, keep: int) -> None:
        """Delete all but the newest, from the index first."""
        entries = self.entries()
        if len(entries) > keep:
            self._write(entries[-keep:])
        known = {entry.folder for entry in entries[-keep:]}
        for folder in self.storage.folders(self.path):
            if folder not in known:
                self.storage.delete(f"{self.path}/{folder}")

    def _write(self, entries: list[_Entry]) -> None:
        self.storage.write_json(f"{self.path}/index.json", _Index(checkpoints=entries).model_dump(mode="json"))


def _entry(folder: str, manifest: Manifest, content: bytes) -> _Entry:
    digest = hashlib.sha256(content).hexdigest()
    return _Entry(folder=folder, step=manifest.step, weights=manifest.weights, sha256=digest)


# -- saving ----------------------------------------------------------------------------------------------------------


class TakenOverError(TrainingError):
    """Another driver trains this run now: nothing of this one may count any more."""


class _AbandonedError(TrainingError):
    """The first worker waits no longer for the part of a worker that failed."""


class Checkpointer:
    """Saves beside training: a copy at once, and a thread that writes it. Every worker calls each method of its own.

    What is done when a save fails on any worker is in `settings.on_failure`.
    """

    def __init__(
        self,
        run: RunFolder,
        parallel: "Parallel",
        training_digest: str,
        settings: CheckpointSpec,
        flush: Callable[[], None] = lambda: None,
        still_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        """The first worker calls both, in its thread, right before a checkpoint counts.

        `flush` brings the metrics of the steps so far to storage, or raises `StorageError`. `still_ours` is asked last:
        whether no other driver has taken over the run.
        """
        self._checkpoints = Checkpoints(run)
        self._parallel, self._training_digest, self._settings = parallel, training_digest, settings
        self._flush, self._still_ours = flush, still_ours
        # Where a failure is told, training waits, and the storage may be its reason.
        impatient = RunFolder(run.storage.without_retries(), run.run_id)
        self._checkpoints_now, self._events = Checkpoints(impatient), EventLog(impatient.storage, run.run_id)
        self._thread: threading.Thread | None = None
        self._folder, self._step = "", 0
        self._failure: FtError | None = None
        self._abandoned = threading.Event()
        self._failures_in_a_row = 0
        self._written = 0
        """Tensors written so far, by this worker."""
        self._newest = self._checkpoints.newest_step() if parallel.is_first else 0
        self._newest_at = time.monotonic()

    def save(self, state: TrainingState, weights: str, after: Callable[[set[str]], None]) -> None:
        """Copy what is to be saved and return; the one before is waited for first.

        `weights` is the place of the best weights. `after`, on the first worker and in its thread, is told which
        places the checkpoints that are kept refer to. Raises as `wait` does.
        """
        self.wait()
        parallel = self._parallel
        token = parallel.from_first(secrets.token_hex(4))
        folder = f"step-{state.step:06}-{token}"
        optimizer = parallel.optimizer_state()
        tensors: dict[str, torch.Tensor] = {}
        spans: dict[str, Span] = {}
        for shard in optimizer.shards():
            if len(shard.written):
                spans[shard.name] = shard.written
                own = slice(shard.written.start - shard.held.start, shard.written.stop - shard.held.start)
                for kind in KINDS:
                    tensors[f"{shard.name}/{kind}"] = shard.tensors[kind][own].to("cpu", copy=True)
        random = {f"random/{name}": generator for name, generator in parallel.random_state().items()}
        draft = {
            "step": state.step,
            "adam_step": optimizer.step,
            "state": asdict(state),
            "weights": weights,
            "training_digest": self._training_digest,
        }
        self._folder, self._step = folder, state.step
        self._abandoned.clear()
        self._thread = threading.Thread(
            target=self._write, args=(folder, tensors, spans, random, draft, after), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write under way, on all workers; if it failed on any, that is told.

        Raises `TrainingError` on all workers if `settings.on_failure` is 'stop', and `TakenOverError` if it was that.
        """
        if self._thread is None:
            return
        failed = 0.0

        def look() -> None:
            nonlocal failed
            (failed,) = self._parallel.sums_over_workers(float(self._failure is not None))
            if failed:  # the part of that worker will not come
                self._abandoned.set()

        _wait_together(self._parallel, self._thread, lambda: self._written, look)
        self._thread = None
        failure, self._failure = self._failure, None
        if failed:
            found = self._parallel.from_all(failure)
            self._give_up({rank: error for rank, error in enumerate(found) if error is not None})

    def _give_up(self, failures: dict[int, FtError]) -> None:
        causes = {rank: error for rank, error in failures.items() if not isinstance(error, _AbandonedError)}
        rank, cause = next(iter(causes.items()))
        others = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
        told = f"The checkpoint of step {self._step} could not be written: worker {rank}{others}: {cause}"
        is_taken_over = isinstance(cause, TakenOverError)
        if self._parallel.is_first:
            if not any(isinstance(error, UnreachableError) for error in causes.values()):
                with suppress(StorageError):
                    self._checkpoints_now.discard(self._folder)
            if not is_taken_over:  # the events are those of the other driver now
                self._tell_failure(told, sorted(causes))
        if is_taken_over:
            raise TakenOverError(str(cause))
        if self._settings.on_failure == "stop":
            raise TrainingError(f"{told} The run ends here, since checkpoint.on_failure = 'stop'.")

    def _tell_failure(self, told: str, workers: list[int]) -> None:
        self._failures_in_a_row = failures = self._failures_in_a_row + 1
        stays = f"The one of step {self._newest} stays." if self._newest else "There is none yet."
        goes_on = " Training goes on, and the next save tries again." if self._settings.on_failure == "continue" else ""
        step, newest = self._step, self._newest
        message = f"{told} {stays}{goes_on}"
        self._tell(CheckpointFailed(message=message, step=step, workers=workers, newest_step=newest))
        times, rest = divmod(failures, ALARMING_FAILURES)
        if rest == 0 and times & (times - 1) == 0:  # at 3, 6, 12, ...
            seconds = time.monotonic() - self._newest_at
            alarm = (
                f"WITHOUT A CHECKPOINT for {format_duration(seconds)}: {failures} saves in a row failed. {stays} "
                f"If a worker dies now, {self._step - self._newest} steps are lost. Mend the storage while the run "
                "lasts: it then saves by itself."
            )
            self._tell(
                CheckpointsKeepFailing(message=alarm, step=step, workers=workers, newest_step=newest, failures=failures)
            )

    def _tell(self, event: Event) -> None:
        if self._events.emit(event):  # otherwise it has gone to stderr already
            print(event.message, file=sys.stderr, flush=True)

    def _write(
        self,
        folder: str,
        tensors: dict[str, torch.Tensor],
        spans: dict[str, Span],
        random: dict[str, torch.Tensor],
        draft: dict[str, Any],
        after: Callable[[set[str]], None],
    ) -> None:
        try:
            self._write_part(folder, tensors, spans, random)
            if self._parallel.is_first:
                parts = list(self._all_parts(folder))
                manifest = Manifest.model_validate({**draft, "created": datetime.now(UTC), "parts": parts})
                self._flush()
                if not self._still_ours():
                    raise TakenOverError("another driver has taken over this run. Leave it to that one.")
                self._checkpoints.commit(folder, manifest)
        except Exception as error:  # whatever it is, the loop must hear of it
            self._failure = error if isinstance(error, FtError) else TrainingError(f"{type(error).__name__}: {error}")
            return
        if self._parallel.is_first:
            self._note_success(manifest.step)
            self._tidy_up(after)

    def _note_success(self, step: int) -> None:
        before = f", after {self._failures_in_a_row} that failed" if self._failures_in_a_row else ""
        self._newest, self._newest_at, self._failures_in_a_row = step, time.monotonic(), 0
        self._events.emit(CheckpointSaved(message=f"Checkpoint at step {step}{before}.", step=step))

    def _tidy_up(self, after: Callable[[set[str]], None]) -> None:
        try:
            self._checkpoints.forget_all_but(self._settings.keep)
            after({entry.weights for entry in self._checkpoints.entries()})
        except Exception as error:  # the new checkpoint counts all the same
            message = f"Old checkpoints could not be deleted: {error} The next save tries again."
            self._tell(OldCheckpointsLeft(message=message, step=self._newest))

    def _write_part(
        self, folder: str, tensors: dict[str, torch.Tensor], spans: dict[str, Span], random: dict[str, torch.Tensor]
    ) -> None:
        storage, path = self._checkpoints.storage, f"{self._checkpoints.path}/{folder}"
        everything = tensors | random
        formats = {name: TensorFormat(DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in everything.items()}
        stem = f"part-{self._parallel.rank:05}-of-{self._parallel.world_size:05}"
        file = WeightFile(f"{stem}.safetensors", self._parallel.rank, formats)

        def write_tensors() -> str:
            with WeightWriter([file], lambda name: storage.writing(f"{path}/{name}")) as writer:
                for name, tensor in everything.items():
                    writer.write(name, tensor)
                    self._written += 1
            return writer.digests[file.name]

        sha256 = storage.retry(write_tensors)  # a stream that breaks cannot be mended: it begins anew
        at, shards = len(file.header), {}
        for name, span in spans.items():
            shards[name] = StoredShard(start=span.start, stop=span.stop, at=at)
            at += len(KINDS) * len(span) * _FP32
        part = Part(
            file=file.name,
            bytes=at + sum(generator.nbytes for generator in random.values()),
            sha256=sha256,
            shards=shards,
            rng_offset=at,
            rng_bytes={name.removeprefix("random/"): generator.nbytes for name, generator in random.items()},
        )
        storage.write_bytes(f"{path}/{stem}.json", part.model_dump_json().encode())

    def _all_parts(self, folder: str) -> Iterator[Part]:
        storage, world_size = self._checkpoints.storage, self._parallel.world_size
        deadline = time.monotonic() + COMMIT_TIMEOUT_SECONDS
        for rank in range(world_size):
            path = f"{self._checkpoints.path}/{folder}/part-{rank:05}-of-{world_size:05}.json"
            while not storage.exists(path):
                if self._abandoned.is_set():
                    raise _AbandonedError(f"checkpoint {folder} was given up.")
                if time.monotonic() > deadline:
                    raise TrainingError(f"worker {rank} wrote no part of checkpoint {folder}.")
                time.sleep(_POLL_SECONDS)
            yield Part.model_validate(storage.read_json(path))


def _wait_together(
    parallel: "Parallel", thread: threading.Thread, progress: Callable[[], int], look: Callable[[], None] = lambda: None
) -> None:
    """Every worker waits for the threads of all; `progress` counts what this one's has done, `look` is called between.

    The watchdog hears that all is well as long as any of them gets on: a storage that is slow, or away for a while, is
    no hang, but one that never answers is.
    """
    running, done, since = 1.0, -1.0, time.monotonic()
    while running:
        thread.join(_POLL_SECONDS)
        running, total = parallel.sums_over_workers(float(thread.is_alive()), float(progress()))
        look()
        now = time.monotonic()
        if total != done:
            done, since = total, now
        if now - since < _STUCK_SECONDS:
            parallel.on_progress()


# -- resuming --------------------------------------------------------------------------------------------------------


def resume(run: RunFolder, parallel: "Parallel", training_digest: str, events: EventLog) -> Manifest | None:
    """Restore the newest sound checkpoint, or none if there is none. Every worker calls it, once the model is wrapped.

    A damaged one is told as an event, and the one before is taken. Raises `TrainingError` when checkpoints are there
    and none is sound, or when they are of another course (data, model, method, or schedule); `UnreachableError` on all
    workers when the storage does not answer to any.
    """
    checkpoints = Checkpoints(run)
    entries, problem = parallel.from_first(checkpoints.look() if parallel.is_first else None)
    if problem and parallel.is_first:
        told = f"{problem} Going on from the {len(entries)} checkpoints found beside it."
        events.emit(CheckpointDamaged(message=told, step=entries[-1].step))
    for entry in reversed(entries):
        manifest, problem, away = None, "", None
        try:
            manifest = checkpoints.manifest(entry)
        except UnreachableError as error:
            away = error
        except (FtError, ValueError) as error:
            problem = str(error)
        if not any(parallel.from_all(manifest is None)):
            assert manifest is not None
            problem, away = _check_parts(checkpoints, entry.folder, manifest, parallel)
        # Passed over for a server that is away, a sound checkpoint would be trained again.
        if unreachable := [error for error in parallel.from_all(away) if error is not None]:
            raise unreachable[0]
        problems = list(dict.fromkeys(found for found in parallel.from_all(problem) if found))
        if problems or manifest is None:
            if parallel.is_first:
                told = f"Checkpoint {entry.folder} is damaged, and skipped: {' '.join(problems)}"
                events.emit(CheckpointDamaged(message=told, step=entry.step))
            continue
        if manifest.training_digest != training_digest:
            raise TrainingError(
                f"run {run.run_id}: its checkpoints are of another model, method, data or schedule than the spec. "
                "Give another --run-id, or the spec it began with."
            )
        _restore(checkpoints, entry.folder, manifest, parallel)
        return manifest
    if entries:
        raise TrainingError(
            f"run {run.run_id}: none of its {len(entries)} checkpoints is sound. Give another --run-id."
        )
    return None


def _check_parts(
    checkpoints: Checkpoints, folder: str, manifest: Manifest, parallel: "Parallel"
) -> tuple[str, UnreachableError | None]:
    """What is wrong with the parts that this worker looks at, and whether that cannot be told now."""
    found: list[str] = []
    away: list[UnreachableError] = []
    chunks = 0

    def count() -> None:
        nonlocal chunks
        chunks += 1

    def check() -> None:
        try:
            for part in manifest.parts[parallel.rank :: parallel.world_size]:
                found.append(checkpoints.damaged(folder, part, count))
        except UnreachableError as error:
            away.append(error)
        except Exception as error:  # it must not end in a thread
            found.append(f"{type(error).__name__}: {error}")

    # In a thread, so that workers with little to read wait for the others without seeming to hang.
    thread = threading.Thread(target=check, name="checking", daemon=True)
    thread.start()
    _wait_together(parallel, thread, lambda: chunks)
    return "".join(found), away[0] if away else None


def _restore(checkpoints: Checkpoints, folder: str, manifest: Manifest, parallel: "Parallel") -> None:
    storage = checkpoints.storage
    where: dict[str, list[tuple[str, StoredShard]]] = {}
    for part in manifest.parts:
        for name, shard in part.shards.items():
            where.setdefault(name, []).append((f"{checkpoints.path}/{folder}/{part.file}", shard))

    def read(name: str, kind: str, span: Span, target: torch.Tensor) -> None:
        parallel.on_progress()
        filled = 0
        for path, shard in where.get(name, ()):
            start, stop = max(span.start, shard.start), min(span.stop, shard.stop)
            if start >= stop:
                continue
            at = shard.at + _FP32 * (KINDS.index(kind) * (shard.stop - shard.start) + start - shard.start)
            content = storage.read_range(path, at, _FP32 * (stop - start))
            values = torch.frombuffer(bytearray(content), dtype=torch.float32)
            target[start - span.start : stop - span.start].copy_(values)
            filled += stop - start
        if filled != len(span):
            raise TrainingError(f"checkpoint {folder}: holds {filled:,} of {len(span):,} elements of {name}.")

    parallel.optimizer_state().restore(read, manifest.adam_step)
    if len(manifest.parts) == parallel.world_size:  # on another number of workers, dropout is drawn anew
        part = manifest.parts[parallel.rank]
        at, state = part.rng_offset, {}
        for name, length in part.rng_bytes.items():
            content = storage.read_range(f"{checkpoints.path}/{folder}/{part.file}", at, length)
            state[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            at += length
        parallel.restore_random_state(state)
