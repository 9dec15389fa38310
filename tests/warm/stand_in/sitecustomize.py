"""Python imports this at the start of each process that has this folder on its path: see `tests.warm.server`.

A process whose command the server takes over stays as its stand-in: it passes signals on, and ends as the other ends.
"""

import os
import sys


def _is_taken_over() -> bool:
    if "FT_WARM_SOCKET" not in os.environ:
        return False
    command = " ".join(sys.orig_argv)
    if "/setup_worker.py" in command:  # Ray's: it prepares the environment, and then becomes the worker
        return False
    return any(part in command for part in os.environ["FT_WARM_COMMANDS"].split(":"))


def _stand_in() -> None:
    import json
    import signal
    import socket
    from contextlib import suppress

    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["FT_WARM_SOCKET"])  # waits while the server still imports
    request = {"command": sys.orig_argv, "environment": dict(os.environ), "folder": os.getcwd()}
    content = json.dumps(request).encode()
    socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(content)
    answers = server.makefile()
    pid = int(answers.readline())

    def pass_on(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    line = answers.readline()  # a signal interrupts it, and Python takes it up again
    status = int(line) if line else 1
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


if _is_taken_over():
    _stand_in()
