"""Saving checkpoints while training continues: copy what fits in main memory, write in a background thread.

The state of a step (12 bytes a trained parameter, divided among the ranks) does not change until the next step begins.
The thread copies it, file by file, into a staging buffer of bounded size. While the buffer is full, the thread writes
its oldest file, and training waits. Training continues once the whole state is copied or written; the thread then
writes what is left in the buffer. So a state that fits in the buffer delays training by a copy only, and a larger one
by the time to write the part that exceeds it. The buffer never holds more than its size, whatever the state's size and
wherever it is: on the GPU, in main memory, or on NVMe.

A file is copied before it is written, so a broken stream can be written again without the state.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from ft_service.errors import FtError, StorageError, TrainingError, UnreachableError
from ft_service.model.shards import Span
from ft_service.model.writer import DTYPE_NAMES, FileLayout, TensorFormat, WeightWriter
from ft_service.plan.memory import MIN_STAGING_BYTES
from ft_service.runs.events import EventLog
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import CheckpointSpec
from ft_service.train.checkpoints.manifest import FP32_BYTES, Checkpoints, Manifest, Part, RankParts, SavedShard
from ft_service.train.checkpoints.report import SaveReport
from ft_service.train.checkpoints.waiting import PART_TIMEOUT_SECONDS, wait_for_threads, wait_on_all_ranks
from ft_service.train.optimizer_state import KINDS, OptimizerState
from ft_service.train.parallel import Parallel
from ft_service.train.protocol import TrainingState

_POLL_SECONDS = 0.2


class TakenOverError(TrainingError):
    """Another driver trains this run now, so this one must not write any more."""


class _AbandonedError(TrainingError):
    """Rank 0 stopped waiting for the part of a rank that failed."""


@dataclass(frozen=True)
class _Save:
    """One checkpoint being saved, as this rank knows it before its parts are written."""

    folder: str
    step: int
    optimizer: OptimizerState
    random: dict[str, torch.Tensor]
    """``random/generator`` -> its state, as bytes"""
    manifest: dict[str, Any]
    """The fields of `Manifest` that are known before the parts are written."""


@dataclass
class _StagedFile:
    """A part file whose tensors are copied to main memory and not yet written."""

    name: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """``parameter/kind`` -> fp32 elements, in the order of the file"""
    spans: dict[str, Span] = field(default_factory=dict)
    """Parameter -> which of its elements `tensors` has; in the same order"""
    random: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Checkpointer:
    """Saves checkpoints in a background thread. Every rank calls every method.

    `settings.on_failure` decides what happens when a save fails on any rank.
    """

    def __init__(
        self,
        run: RunFolder,
        parallel: Parallel,
        training_digest: str,
        settings: CheckpointSpec,
        flush: Callable[[], None] = lambda: None,
        still_ours: Callable[[], bool] = lambda: True,
        staging_bytes: int = MIN_STAGING_BYTES,
    ) -> None:
        """`staging_bytes` bounds the copies that this rank holds in main memory.

        Rank 0 calls `flush` and `still_ours` in its thread, right before it commits a checkpoint.

        `flush` writes the metrics of the steps so far to storage, or raises `StorageError`. `still_ours` says whether
        this driver still leads the run.
        """
        self._checkpoints = Checkpoints(run)
        self._parallel = parallel
        self._training_digest = training_digest
        self._settings = settings
        self._flush = flush
        self._still_ours = still_ours
        self._staging_bytes = staging_bytes
        # Training waits while a failure is reported, and the storage may be what failed: do not retry for long.
        no_retry = RunFolder(run.storage.without_retries(), run.run_id)
        self._checkpoints_no_retry = Checkpoints(no_retry)
        newest_step = self._checkpoints.newest_step() if parallel.is_rank_zero else 0
        self._report = SaveReport(EventLog(no_retry.storage, run.run_id), settings, newest_step)
        self._thread: threading.Thread | None = None
        # Of the save under way. The staged files live in its thread alone, so that their memory is freed with it.
        self._folder = ""
        self._step = 0
        self._failure: FtError | None = None
        self._abandoned = threading.Event()
        self._copied = threading.Event()
        """The state is copied or written, so training may change it; or the save has failed."""
        self._tensors_done = 0
        """Tensors that this rank has copied or written, over all saves."""

    def save(self, state: TrainingState, weights: str, after: Callable[[set[str]], None]) -> None:
        """Wait for the previous save, start this one, and return once training may change the state.

        `weights` is the path of the best weights. Rank 0 calls `after` in its thread, with the weights that the kept
        checkpoints refer to. Raises as `wait` does.
        """
        self.wait()
        save = self._begin(state, weights)
        self._folder = save.folder
        self._step = save.step
        self._abandoned.clear()
        self._copied.clear()
        self._thread = threading.Thread(target=self._write, args=(save, after), name="checkpoint", daemon=True)
        self._thread.start()
        wait_on_all_ranks(self._parallel, self._copied.wait, lambda: self._tensors_done)

    def wait(self) -> None:
        """Wait until no rank is writing any more, and report failures.

        If a save failed, raises `TrainingError` on all ranks if `settings.on_failure` is 'stop', and `TakenOverError`
        if another driver has taken over the run.
        """
        if self._thread is None:
            return
        num_failed = 0.0

        def count_failures() -> None:
            nonlocal num_failed
            (num_failed,) = self._parallel.sum_over_ranks(float(self._failure is not None))
            if num_failed:  # the part of that rank will never come
                self._abandoned.set()

        wait_for_threads(self._parallel, self._thread, lambda: self._tensors_done, count_failures)
        self._thread = None
        failure = self._failure
        self._failure = None
        if num_failed:
            failures = self._parallel.all_gather_object(failure)
            self._handle_failure({rank: error for rank, error in enumerate(failures) if error is not None})

    def _begin(self, state: TrainingState, weights: str) -> _Save:
        token = self._parallel.broadcast_from_rank_zero(secrets.token_hex(4))
        optimizer = self._parallel.optimizer_state()
        return _Save(
            folder=f"step-{state.step:06}-{token}",
            step=state.step,
            optimizer=optimizer,
            random={f"random/{name}": generator for name, generator in self._parallel.random_state().items()},
            manifest={
                "step": state.step,
                "adam_step": optimizer.step,
                "state": asdict(state),
                "weights": weights,
                "training_digest": self._training_digest,
            },
        )

    def _handle_failure(self, failures: dict[int, FtError]) -> None:
        causes = {rank: error for rank, error in failures.items() if not isinstance(error, _AbandonedError)}
        rank, cause = next(iter(causes.items()))
        others = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
        problem = f"The checkpoint of step {self._step} could not be saved: worker {rank}{others}: {cause}"
        is_taken_over = isinstance(cause, TakenOverError)
        if self._parallel.is_rank_zero:
            if not any(isinstance(error, UnreachableError) for error in causes.values()):
                with suppress(StorageError):
                    self._checkpoints_no_retry.discard(self._folder)
            if not is_taken_over:  # the event log belongs to the other driver now
                self._report.failed(self._step, problem, sorted(causes))
        if is_taken_over:
            raise TakenOverError(str(cause))
        if self._settings.on_failure == "stop":
            raise TrainingError(f"{problem} The run stops because checkpoint.on_failure = 'stop'.")

    # -- in the background thread ------------------------------------------------------------------------------------

    def _write(self, save: _Save, after: Callable[[set[str]], None]) -> None:
        try:
            self._write_parts(save)
            if self._parallel.is_rank_zero:
                self._commit(save)
        except Exception as error:  # every error reaches the training loop, in `wait`
            self._failure = error if isinstance(error, FtError) else TrainingError(f"{type(error).__name__}: {error}")
            return
        finally:
            self._copied.set()
        if self._parallel.is_rank_zero:
            self._report.saved(save.step)
            self._delete_old(after)

    def _write_parts(self, save: _Save) -> None:
        parts: list[Part] = []
        staged: deque[_StagedFile] = deque()
        for file in self._files(save, lambda: self._make_room(save, staged, parts)):
            staged.append(file)
        self._copied.set()
        while staged:
            parts.append(self._write_part(save, staged.popleft()))
        path = f"{self._checkpoints.path}/{save.folder}/{self._stem}.json"
        self._checkpoints.storage.write_bytes(path, RankParts(parts=parts).model_dump_json().encode())

    @property
    def _stem(self) -> str:
        """Name of this rank's part, without extension."""
        return f"part-{self._parallel.rank:05}-of-{self._parallel.world_size:05}"

    def _make_room(self, save: _Save, staged: deque[_StagedFile], parts: list[Part]) -> None:
        """Write the oldest files until one more of the largest size fits in the staging buffer."""
        while staged and sum(file.nbytes for file in staged) + self._file_bytes > self._staging_bytes:
            parts.append(self._write_part(save, staged.popleft()))

    @property
    def _file_bytes(self) -> int:
        """Size from which on another file begins: half the buffer, so that it can be full while training continues."""
        return self._staging_bytes // 2

    def _files(self, save: _Save, make_room: Callable[[], None]) -> Iterator[_StagedFile]:
        """This rank's files, each with its tensors copied; the last one has the random state too.

        Calls `make_room` before it copies anything into a new file. Only the last piece of a parameter that is split
        over files has its end.
        """
        bytes_per_element = len(KINDS) * FP32_BYTES
        file = _StagedFile(f"{self._stem}.safetensors")
        number = 0
        for shard in save.optimizer.shards():
            start = shard.written.start
            while start < shard.written.stop:
                room = (self._file_bytes - file.nbytes) // bytes_per_element
                if room <= 0:
                    yield file
                    make_room()
                    number += 1
                    file = _StagedFile(f"{self._stem}-{number}.safetensors")
                    room = max(1, self._file_bytes // bytes_per_element)
                span = Span(start, min(shard.written.stop, start + room))
                own = slice(span.start - shard.held.start, span.stop - shard.held.start)
                for kind in KINDS:
                    file.tensors[f"{shard.name}/{kind}"] = shard.tensors[kind][own].to("cpu", copy=True)
                    self._tensors_done += 1
                file.spans[shard.name] = span
                start = span.stop
        file.random = save.random
        yield file

    def _write_part(self, save: _Save, staged: _StagedFile) -> Part:
        storage = self._checkpoints.storage
        path = f"{self._checkpoints.path}/{save.folder}"
        everything = staged.tensors | staged.random
        formats = {name: TensorFormat(DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in everything.items()}
        file = FileLayout(staged.name, self._parallel.rank, formats)

        def write_tensors() -> str:
            with WeightWriter([file], lambda name: storage.writing(f"{path}/{name}")) as writer:
                for name, tensor in everything.items():
                    writer.write(name, tensor)
                    self._tensors_done += 1
            return writer.digests[file.name]

        sha256 = storage.retry(write_tensors)  # a broken stream cannot be continued: a retry starts over
        at = len(file.header)
        shards = {}
        for name, span in staged.spans.items():
            shards[name] = SavedShard(start=span.start, stop=span.stop, at=at)
            at += len(KINDS) * len(span) * FP32_BYTES
        return Part(
            file=file.name,
            bytes=at + sum(generator.nbytes for generator in staged.random.values()),
            sha256=sha256,
            shards=shards,
            rng_offset=at,
            rng_bytes={name.removeprefix("random/"): state.nbytes for name, state in staged.random.items()},
        )

    def _commit(self, save: _Save) -> None:
        parts = list(self._wait_for_parts(save.folder))
        manifest = Manifest.model_validate({**save.manifest, "created": datetime.now(UTC), "parts": parts})
        self._flush()
        if not self._still_ours():
            raise TakenOverError("another driver has taken over this run. This one stops.")
        self._checkpoints.commit(save.folder, manifest)

    def _wait_for_parts(self, folder: str) -> Iterator[Part]:
        storage = self._checkpoints.storage
        world_size = self._parallel.world_size
        deadline = time.monotonic() + PART_TIMEOUT_SECONDS
        for rank in range(world_size):
            path = f"{self._checkpoints.path}/{folder}/part-{rank:05}-of-{world_size:05}.json"
            while not storage.exists(path):
                if self._abandoned.is_set():
                    raise _AbandonedError(f"checkpoint {folder} was abandoned.")
                if time.monotonic() > deadline:
                    raise TrainingError(f"worker {rank} wrote no part of checkpoint {folder}.")
                time.sleep(_POLL_SECONDS)
            yield from RankParts.model_validate(storage.read_json(path)).parts

    def _delete_old(self, after: Callable[[set[str]], None]) -> None:
        try:
            self._checkpoints.keep_newest(self._settings.keep)
            after({entry.weights for entry in self._checkpoints.entries()})
        except Exception as error:  # the new checkpoint is complete all the same
            self._report.not_deleted(error)
