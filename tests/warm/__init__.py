"""Processes that start warm: see `tests.warm.server`."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMANDS = ("/default_worker.py", "ft_service.cli.app")
"""What a command line must contain to be taken over: the workers of Ray, and `ft`."""
END_SECONDS = 20
_FOLDER = Path(__file__).parent


@contextmanager
def warm_server(log: Path) -> Iterator[dict[str, str]]:
    """Yields the environment of processes that start warm. All of them have ended after the block."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder, log.open("wb") as output:
        # One CPU thread a process, as the workers have: what is read at the import of torch stays.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        # Listening before there is a server: who comes meanwhile waits for it.
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/socket")
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, str(_FOLDER / "server.py"), str(listener.fileno())],
            env=environment,
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # closed, it ends the server
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield {
                "FT_WARM_SOCKET": f"{folder}/socket",
                "FT_WARM_COMMANDS": ":".join(COMMANDS),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(_FOLDER / "stand_in"), os.environ.get("PYTHONPATH")])),
            }
        finally:
            assert server.stdin is not None
            server.stdin.close()
            listener.close()
            try:
                server.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
