"""What every command shares: errors as one clear message and a true exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ft_service.errors import FtError


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn an `FtError` into its text on standard error and its exit code; anything else is a bug, with its trace."""
    try:
        yield
    except FtError as error:
        print(f"{error.label}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
