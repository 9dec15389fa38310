"""Python processes without the seconds that each spends on importing torch, transformers and DeepSpeed.

This one imports them once and is then forked for every command that its clients hand over: processes that Ray starts,
and the project's own commands. Each is a process of its own, as it would be without; only the libraries are there
already. Two are not among them: the project, since a process imports the code that was shipped to it; and Ray, which
reads settings that differ between its processes when it is imported.

python tests/warm/server.py LISTENER      (the number of an open file: a Unix socket that listens)
"""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


def preload() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    from deepspeed.accelerator import get_accelerator

    # Each worker would otherwise ask ninja whether the operator is still built.
    get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    gc.collect()
    gc.freeze()  # a garbage collection in a child would copy all these pages


@dataclass(frozen=True)
class Request:
    """A command as its stand-in was started with it."""

    command: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]
    """Its stdin, stdout and stderr, open here."""


class Server:
    """Forks a child for each request. A child is killed when its stand-in is gone, and the other way round."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._woken, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        self._wake = wake
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(0, selectors.EVENT_READ)
        self._clients: dict[int, socket.socket] = {}
        """By process id of their children."""

    def serve(self) -> Request | None:
        """Returns in each child, with what it shall do; None in the server, once its stdin is closed."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == 0:
                    for pid in self._clients:
                        os.kill(pid, signal.SIGKILL)
                    return None
                if key.fileobj is self._listener:
                    client, _ = self._listener.accept()
                    request = _received(client)
                    if request is not None and (pid := self._fork(client, request)) == 0:
                        return request
                elif key.fileobj == self._woken:
                    with suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                    self._reap()
                else:
                    self._end(key.data)

    def _fork(self, client: socket.socket, request: Request) -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            self._leave(client)
            return 0
        for file in request.files:
            os.close(file)
        with suppress(OSError):
            client.sendall(f"{pid}\n".encode())
        self._clients[pid] = client
        self._selector.register(client, selectors.EVENT_READ, pid)
        return pid

    def _leave(self, client: socket.socket) -> None:
        """In a child: nothing of the server stays open."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for each in (self._listener, client, *self._clients.values()):
            each.close()
        os.close(self._woken)
        os.close(self._wake)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (client := self._clients.pop(pid, None)) is not None:
                self._selector.unregister(client)
                with suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                client.close()

    def _end(self, pid: int) -> None:
        """The stand-in was killed: so is the child."""
        if (client := self._clients.pop(pid, None)) is not None:  # or both have ended
            self._selector.unregister(client)
            client.close()
            os.kill(pid, signal.SIGKILL)  # not yet waited for: the number is still its own


def _received(client: socket.socket) -> Request | None:
    head, files, _, _ = socket.recv_fds(client, 8, 3)
    left, parts = int.from_bytes(head, "big"), []
    while left and (part := client.recv(left)):
        parts.append(part)
        left -= len(part)
    if left:
        client.close()
        return None
    asked: dict[str, Any] = json.loads(b"".join(parts))
    return Request(asked["command"], asked["environment"], asked["folder"], list(files))


def run(request: Request, own_path: list[str]) -> None:
    """What the interpreter does between its start and the first line of a program, and then the program."""
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    arguments = request.command[1:]
    unbuffered = "PYTHONUNBUFFERED" in os.environ
    while arguments[0].startswith("-") and arguments[0] not in ("-m", "-c"):
        unbuffered = unbuffered or arguments[0] == "-u"
        del arguments[0]
    sys.stdout.reconfigure(line_buffering=True, write_through=unbuffered)  # type: ignore[union-attr]
    sys.orig_argv = list(request.command)
    kind = arguments.pop(0) if arguments[0] in ("-m", "-c") else ""
    program, sys.argv = arguments[0], [arguments[0], *arguments[1:]]
    first = {"": str(Path(program).resolve().parent), "-m": os.getcwd(), "-c": ""}[kind]
    shipped = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *shipped, *own_path]
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[0] = "-c"
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")


def main() -> None:
    own_path = sys.path[1:]
    preload()
    request = Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    if request is not None:
        run(request, own_path)


if __name__ == "__main__":
    main()
