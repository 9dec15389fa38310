"""Resuming: find the newest intact checkpoint, and restore optimizer, weights and random state from it."""

import threading

import torch

from ft_service.errors import FtError, NewerFormatError, TrainingError, UnreachableError
from ft_service.model.shards import Span
from ft_service.plan.plan import RunPlan
from ft_service.runs.events import CheckpointDamaged, EventLog
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import (
    FP32_BYTES,
    Checkpoints,
    IndexEntry,
    Manifest,
    Part,
    SavedShard,
)
from ft_service.train.checkpoints.waiting import wait_for_threads
from ft_service.train.optimizer_state import KINDS
from ft_service.train.parallel import Parallel


def resume(run: RunFolder, parallel: Parallel, plan: RunPlan, events: EventLog) -> Manifest | None:
    """Restore the newest intact checkpoint; None if the run has no checkpoint yet.

    Every rank calls it, after the model is wrapped. A damaged checkpoint is reported as an event, and the one before it
    is used. Raises `TrainingError` if all checkpoints are damaged, or if they belong to another training (data, model,
    method or schedule), `NewerFormatError` on all ranks if a newer version wrote the newest intact checkpoint, and
    `UnreachableError` on all ranks if the storage does not answer one of them.
    """
    checkpoints = Checkpoints(run)
    entries = _list(checkpoints, parallel, events)
    for entry in reversed(entries):
        manifest, problem = _check(checkpoints, entry, parallel)
        if manifest is None:
            if parallel.is_rank_zero:
                message = f"Checkpoint {entry.folder} is damaged and was skipped: {problem}"
                events.emit(CheckpointDamaged(message=message, step=entry.step))
            continue
        if not plan.continues(manifest.training_digest, manifest.step):
            raise TrainingError(
                f"run {run.run_id}: its checkpoints were saved with another model, method, data or schedule than this "
                "spec has. Use another --run-id, or the original spec."
            )
        _restore(checkpoints.storage, f"{checkpoints.path}/{entry.folder}", manifest, parallel)
        return manifest
    if entries:
        raise TrainingError(f"run {run.run_id}: all {len(entries)} checkpoints are damaged. Use another --run-id.")
    return None


def _list(checkpoints: Checkpoints, parallel: Parallel, events: EventLog) -> list[IndexEntry]:
    """All checkpoints, oldest first, the same on every rank."""
    entries: list[IndexEntry]
    entries, problem = parallel.broadcast_from_rank_zero(checkpoints.read_index() if parallel.is_rank_zero else None)
    if problem and parallel.is_rank_zero:
        message = f"{problem} Using the {len(entries)} checkpoints whose manifests were found."
        events.emit(CheckpointDamaged(message=message, step=entries[-1].step))
    return entries


def _check(checkpoints: Checkpoints, entry: IndexEntry, parallel: Parallel) -> tuple[Manifest | None, str]:
    """The manifest, or None and all problems that any rank found: the same on every rank.

    Raises `UnreachableError` on all ranks if the storage does not answer one of them, and `NewerFormatError` on all
    ranks if a newer version wrote the manifest.
    """
    manifest: Manifest | None = None
    problem = ""
    unusable: UnreachableError | NewerFormatError | None = None
    try:
        manifest = checkpoints.manifest(entry)
    except (UnreachableError, NewerFormatError) as error:
        unusable = error
    except (FtError, ValueError) as error:
        problem = str(error)
    if not any(parallel.all_gather_object(manifest is None)):
        assert manifest is not None
        problem, unusable = _check_parts(checkpoints, entry.folder, manifest, parallel)
    # An intact checkpoint must not be skipped because a server is down, or this version is too old: its steps would be
    # trained again.
    if errors := [error for error in parallel.all_gather_object(unusable) if error is not None]:
        raise errors[0]
    problems = list(dict.fromkeys(found for found in parallel.all_gather_object(problem) if found))
    return (None if problems else manifest), " ".join(problems)


def _check_parts(
    checkpoints: Checkpoints, folder: str, manifest: Manifest, parallel: Parallel
) -> tuple[str, UnreachableError | None]:
    """What is wrong with this rank's share of the parts, or that the storage does not answer."""
    problems: list[str] = []
    unreachable: list[UnreachableError] = []
    num_chunks = 0

    def count_chunk() -> None:
        nonlocal num_chunks
        num_chunks += 1

    def check() -> None:
        try:
            for part in manifest.parts[parallel.rank :: parallel.world_size]:
                problems.append(checkpoints.part_problem(folder, part, count_chunk))
        except UnreachableError as error:
            unreachable.append(error)
        except Exception as error:  # an error must not get lost with the thread
            problems.append(f"{type(error).__name__}: {error}")

    # In a thread, so that ranks with little to read keep sending beats to the watchdog while they wait for the others.
    thread = threading.Thread(target=check, name="checking", daemon=True)
    thread.start()
    wait_for_threads(parallel, thread, lambda: num_chunks)
    return "".join(problems), unreachable[0] if unreachable else None


def _restore(storage: Storage, folder: str, manifest: Manifest, parallel: Parallel) -> None:
    saved: dict[str, list[tuple[str, SavedShard]]] = {}
    for part in manifest.parts:
        for name, shard in part.shards.items():
            saved.setdefault(name, []).append((f"{folder}/{part.file}", shard))

    def read(name: str, kind: str, span: Span, target: torch.Tensor) -> None:
        parallel.on_progress()
        num_filled = 0
        for path, shard in saved.get(name, ()):
            start = max(span.start, shard.start)
            stop = min(span.stop, shard.stop)
            if start >= stop:
                continue
            at = shard.at + FP32_BYTES * (KINDS.index(kind) * (shard.stop - shard.start) + start - shard.start)
            content = storage.read_range(path, at, FP32_BYTES * (stop - start))
            values = torch.frombuffer(bytearray(content), dtype=torch.float32)
            target[start - span.start : stop - span.start].copy_(values)
            num_filled += stop - start
        if num_filled != len(span):
            raise TrainingError(f"checkpoint {folder}: holds {num_filled:,} of {len(span):,} elements of {name}.")

    parallel.optimizer_state().restore(read, manifest.adam_step)
    with_random_state = [part for part in manifest.parts if part.rng_bytes]  # one of each rank
    if len(with_random_state) == parallel.world_size:  # on another number of ranks, dropout draws new numbers
        parallel.restore_random_state(_read_random_state(storage, folder, with_random_state[parallel.rank]))


def _read_random_state(storage: Storage, folder: str, part: Part) -> dict[str, torch.Tensor]:
    state = {}
    at = part.rng_offset
    for name, length in part.rng_bytes.items():
        content = storage.read_range(f"{folder}/{part.file}", at, length)
        state[name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        at += length
    return state
