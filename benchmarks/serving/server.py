"""Servers over HTTP: ours, `transformers serve`, and clients that read their streams at little cost."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.work import Ask, Round, World, ask_all, asks_of, report

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300
STOP_SECONDS = 60
QUIET_SECONDS = 120
"""A stream that sends nothing for so long has failed."""
BASE_NAME = "bench-llama"


class FailedRequestError(Exception):
    """A request that got no complete answer."""


class Server:
    """A server's processes, and how to ask it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        port: int,
        body: Callable[[Ask], dict[str, Any]],
        logs: Path | None = None,
    ) -> None:
        """`logs` is Ray's session folder."""
        self._process = psutil.Process(process.pid)
        self.port = port
        self._body = body
        self._logs = logs

    def measure(self, work: Round) -> dict[str, Any]:
        """As a side's process does, with the CPU-seconds of the engine's process and of all others apart."""
        asks = asks_of(work)
        replicas = self.replicas()
        engine = _cpu_seconds(replicas)
        every = _cpu_seconds(self.processes())
        client = time.process_time()
        began = time.perf_counter()
        timings = asyncio.run(ask_all(self.stream, asks, work.clients))
        seconds = time.perf_counter() - began
        client = time.process_time() - client
        every = _cpu_seconds(self.processes()) - every
        engine = _cpu_seconds(replicas) - engine
        tokens = sum(timing.tokens for timing in timings)
        parts = {"engine_process": engine, "server_rest": every - engine, "client": client}
        more = {f"{name}_cpu_ms_per_token": 1000 * part / tokens for name, part in parts.items()}
        return report(timings, seconds, every, **more)

    async def stream(self, ask: Ask) -> AsyncGenerator[int, None]:
        """The number of tokens: 1 with the first event, and the rest at the end, when the usage is known."""
        async for tokens in stream(self.port, self._body(ask)):
            yield tokens

    def processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def replicas(self) -> list[psutil.Process]:
        """The processes that hold an engine."""
        return [process for process in self.processes() if f":{BASE_NAME}" in _title(process)]

    def requests_ended_on_replicas(self) -> set[str]:
        """Ids of the requests that an engine's log has a line about. A killed engine writes none for its last ones."""
        assert self._logs
        found = set()
        for file in self._logs.glob("logs/serve/replica_*.log*"):
            for line in file.read_text(errors="replace").splitlines():
                fields = json.loads(line).get("ft") or {}
                if "adapter" in fields:  # a gateway's lines have none
                    found.add(fields["request"])
        return found

    def hold_engine_to_core(self, engine_core: int, other_core: int) -> None:
        replicas = self.replicas()
        for process in self.processes():
            core = engine_core if process in replicas else other_core
            with contextlib.suppress(FileNotFoundError):
                for thread in os.listdir(f"/proc/{process.pid}/task"):  # an affinity is a thread's
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(int(thread), {core})


async def stream(port: int, body: dict[str, Any], request_id: str = "") -> AsyncGenerator[int, None]:
    """Ask for a streamed completion. Raises `FailedRequestError` unless the answer comes to its end."""
    content = json.dumps(body).encode()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    except OSError as error:
        raise FailedRequestError(repr(error)) from error
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    if request_id:
        head += f"x-request-id: {request_id}\r\n"
    writer.write(f"{head}connection: close\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
    received = []
    begun = False
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise FailedRequestError((status + await reader.read(2000)).decode(errors="replace"))
        while line := await asyncio.wait_for(reader.readline(), QUIET_SECONDS):
            if not line.startswith(b"data: "):
                continue
            received.append(line)
            if not begun and b"[DONE]" not in line and b'"error"' not in line:
                begun = True
                yield 1
    except (OSError, TimeoutError) as error:
        raise FailedRequestError(repr(error)) from error
    finally:
        writer.close()
    if b'"error"' in received[-1] if received else True:
        raise FailedRequestError(received[-1].decode() if received else "an empty stream")
    events = [json.loads(line[6:]) for line in received[-3:] if b"[DONE]" not in line]
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    if usage is None:
        raise FailedRequestError("a stream without an end")
    yield usage["completion_tokens"] - 1


@contextmanager
def our_server(
    world: World, folder: Path, batch: int, replicas: int = 1, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """The Serve application with one base, in processes as nice as this one."""
    port = _free_port()
    base = {
        "base": world.base,
        "name": BASE_NAME,
        "dtype": world.dtype,
        "max_batch": batch,
        "replicas": replicas,
        "cpus": 1,
        "gpus": 0,
        "cache_gib": 0.5,
    }
    file = folder / "settings.json"
    file.write_text(json.dumps({"storage": world.storage, "bases": [base]}))
    command = [sys.executable, "-m", "benchmarks.serving.host", str(file), str(port)]
    settings = {
        # Ray makes its workers nicer than whoever started it: beside other programs the engine would get less.
        "RAY_worker_niceness": "0",
        "RAY_ADDRESS": "",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 s are too few on a busy machine
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    with _running(command, settings, folder / "server.log", b"Serving, logs in ") as process:
        logs = Path(re.findall("Serving, logs in (.*)\n", (folder / "server.log").read_text())[0])
        yield Server(process, port, lambda ask: _body(world, ask), logs)


def _body(world: World, ask: Ask) -> dict[str, Any]:
    return {
        "model": BASE_NAME if ask.adapter is None else world.adapter_ids[ask.adapter],
        "prompt": ask.prompt_ids,
        "max_tokens": ask.answer_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def transformers_server(world: World, folder: Path, threads: int) -> Iterator[Server]:
    """`transformers serve` on the base, with its continuous batching. It takes prompts as text only."""
    from transformers import AutoTokenizer

    port = _free_port()
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    command = [str(Path(sys.executable).parent / "transformers"), "serve", world.base, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", world.dtype, "--device", "cpu", "--continuous-batching"]
    # Its default is nine tenths of the machine's memory, and a CPU never gets as far as to answer.
    command += ["--cb-num-blocks", "512", "--cb-max-batch-tokens", "256"]
    settings = {"OMP_NUM_THREADS": str(threads)}

    def body(ask: Ask) -> dict[str, Any]:
        return {
            "model": world.base,
            "prompt": tokenizer.decode(ask.prompt_ids),
            "max_tokens": ask.answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    with _running(command, settings, folder / "transformers.log", None) as process:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "transformers.log").read_text()[-1000:])
            time.sleep(0.2)
        yield Server(process, port, body)


@contextmanager
def _running(
    command: Sequence[str], settings: dict[str, str], log: Path, ready: bytes | None
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **settings}
    environment = {name: value for name, value in environment.items() if value}
    for name in ("FT_API_KEY", "FT_DATABASE_URL"):
        environment.pop(name, None)
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while ready and ready not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)}:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
