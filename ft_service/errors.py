"""The exception hierarchy of the project, and how a command exits on an exception.

    FtError                      exit code 1
    ├── SpecError                exit code 2   an invalid run spec, or one that the resources cannot run
    ├── UsageError               exit code 2   invalid arguments of a command
    ├── DataError                a file or record of the user's data is invalid
    ├── ModelError               a base model is missing, incomplete or of another architecture
    │   └── ModelUnreachableError  its source does not respond; a retry may help
    ├── StorageError             the storage root, or something on it, is unusable
    │   ├── NotPublishedError    no run or adapter with this id
    │   ├── NewerFormatError     a file that a newer version of this software wrote
    │   └── UnreachableError     the storage does not respond; a retry may help
    ├── ExportError              a hub does not accept what is exported to it
    ├── PromotionError           an adapter does not pass the thresholds of its suite
    ├── ClusterError             Ray does not respond, rejects the token, or lacks resources
    ├── TrainingError            training cannot continue (for example: non-finite loss)
    ├── RunStopped               exit code 3   a run was stopped on purpose, and can be resumed
    ├── DatabaseError            the service's database is unusable
    └── ServingError             the server cannot start or respond

A message names the setting or file, its value, and the fix. Ray sends exceptions between processes, so all of them must
pickle: keep every constructor's positional arguments in ``self.args``.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ft_service.text import counted


class FtError(Exception):
    """Base of all errors of this project. A command prints its text without a traceback and exits with `exit_code`."""

    exit_code = 1
    label = "error"


@dataclass(frozen=True)
class Problem:
    """One problem of a run spec.

    `setting` is the dotted path in the spec (``train.global_batch_size``), `value` its current value, `message` what is
    wrong with it, and `fix` how to correct it.
    """

    setting: str
    value: object
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value!r}: {self.message}. {self.fix}"


class SpecError(FtError):
    """A run spec that cannot be run, with all its problems."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem], where: str = "run spec") -> None:
        super().__init__(problems, where)
        self.problems = tuple(problems)
        self.where = where

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.where}: {counted(count, 'problem')}"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


class UsageError(FtError):
    """Invalid arguments of a command."""

    exit_code = 2


class DataError(FtError):
    """Unusable training or validation data. The text names file and line."""


class ModelError(FtError):
    """A base model that is missing, incomplete, or not a Llama."""


class ModelUnreachableError(ModelError):
    """The hub or object store with the base does not respond; a retry may help."""


class StorageError(FtError):
    """The storage root cannot be read or written, or its content is damaged."""


class NotPublishedError(StorageError):
    """The storage has no run, adapter or dataset with this id."""


class NewerFormatError(StorageError):
    """A newer version of this software wrote this file. It is not damaged, and must not count as missing."""


class UnreachableError(StorageError):
    """The storage does not respond (network, server or mount); a retry may help."""


class ExportError(FtError):
    """A hub does not accept an export, or does not respond."""


class PromotionError(FtError):
    """An adapter does not pass the thresholds of its suite, so it is not promoted."""

    def __init__(self, adapter_id: str, failed: Sequence[str], first: str) -> None:
        super().__init__(adapter_id, failed, first)
        self.adapter_id = adapter_id
        self.failed = tuple(failed)
        self.first = first

    def __str__(self) -> str:
        head = f"{self.adapter_id} is not promoted: {counted(len(self.failed), 'check')} failed"
        advice = f"A check that does not matter here can be waived by name: --waive {self.first}=REASON"
        return "\n".join([head, *(f"  - {failure}" for failure in self.failed), advice])


class ClusterError(FtError):
    """Ray does not respond, rejects the token, or lacks the requested resources."""


class TrainingError(FtError):
    """Training cannot continue."""


class RunStopped(FtError):
    """A run was stopped on purpose. It can be resumed from its newest checkpoint."""

    exit_code = 3
    label = "stopped"


class DatabaseError(FtError):
    """The service's database (FT_DATABASE_URL) is away, locked, or of a newer version."""


class ServingError(FtError):
    """The server cannot start, or an engine cannot respond."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an `FtError` on standard error and exit with its code. Any other exception is a bug: keep its traceback."""
    try:
        yield
    except FtError as error:
        print(f"{error.label}: {error}", file=sys.stderr)
        if isinstance(error, RunStopped):
            atexit.register(_end, error.exit_code)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(code: int) -> None:
    """Exit without shutting down the interpreter.

    Trap: stopping a run immediately leaves a thread inside a Ray call, which may abort the process during shutdown.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
