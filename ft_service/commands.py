"""What every command shares: errors as one clear message and a true exit code."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ft_service.errors import FtError, RunStopped


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
