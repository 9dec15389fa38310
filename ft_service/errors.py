"""Every exception the project raises on purpose, in one tree, and how a command exits with one.

    FtError                      exit code 1
    ├── SpecError                exit code 2   the run spec, or spec and resources together, cannot be run
    ├── UsageError               exit code 2   a command was called wrongly
    ├── DataError                a file or record of the user's data
    ├── ModelError               a base model that is absent, incomplete or of another architecture
    │   └── ModelUnreachableError  where it lies does not answer now, and may later
    ├── StorageError             the storage root or something on it
    │   ├── NotPublishedError    no run or adapter of that id
    │   └── UnreachableError     the storage does not answer now, and may later
    ├── ClusterError             Ray does not answer, refuses the token, or lacks what was asked for
    ├── TrainingError            training cannot go on (a non-finite loss, ...)
    ├── RunStopped               exit code 3   a run ended on purpose, and can be resumed
    └── ServingError             the server cannot start or answer

A message names the setting or file, its value, and the cure. Instances cross process borders inside Ray, so all of them
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
    """Base of all errors of this project; a command prints its text, no traceback, and exits with `exit_code`."""

    exit_code = 1
    label = "error"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run spec.

    `setting` is the dotted path in the spec (``train.global_batch_size``), `value` what stands there, `message` what is
    wrong with it, and `cure` what to write instead.
    """

    setting: str
    value: object
    message: str
    cure: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value!r}: {self.message}. {self.cure}"


class SpecError(FtError):
    """A run spec that cannot be run; carries every problem found, not only the first."""

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
    """A command called with arguments that make no sense."""

    exit_code = 2


class DataError(FtError):
    """Training or validation data that cannot be used; the text names file and line."""


class ModelError(FtError):
    """A base model that is absent, half-downloaded, or not a Llama."""


class ModelUnreachableError(ModelError):
    """The hub, or the object store with the base, does not answer now, and may later."""


class StorageError(FtError):
    """The storage root cannot be read or written, or something on it is damaged."""


class NotPublishedError(StorageError):
    """No run, adapter or dataset of that id lies on the storage."""


class UnreachableError(StorageError):
    """The storage does not answer now, and may later: a network, a server or a mount that is away."""


class ClusterError(FtError):
    """Ray does not answer, refuses the token, or lacks the resources asked for."""


class TrainingError(FtError):
    """Training cannot go on."""


class RunStopped(FtError):
    """A run was stopped on purpose: no mistake, and nothing is lost that a checkpoint holds."""

    exit_code = 3
    label = "stopped"


class ServingError(FtError):
    """The server cannot start, or an engine cannot answer."""


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an `FtError` into its text on standard error and its exit code; anything else is a bug, with its trace."""
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
    """End this process without the interpreter's end.

    Trap: a run that was stopped at once leaves a thread in a call of Ray's, which may abort the process meanwhile.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
