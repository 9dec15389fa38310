"""A Ray cluster of several hosts on one machine: each can be killed and started again. Nothing here goes by name."""

import contextlib
import ctypes
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from examples.quickstart.quickstart import OBJECT_STORE_BYTES, free_ports, ray_environment
from ft_service.errors import ClusterError

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 120
END_SECONDS = 30
_POLL_SECONDS = 0.1
_STARTED = "Ray runtime started."
_PR_SET_CHILD_SUBREAPER = 36

# A cluster that notices a silent host within about 8 seconds. Ray's defaults (5000, 3000, 10000, 5) take 20 s when the
# host refuses connections and up to 70 s when it does not answer at all.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


# Ray lets its workers run behind everything else on the machine, the tests that wait for them included.
NOT_NICE = {"RAY_worker_niceness": "0"}


@dataclass(frozen=True)
class Host:
    """Where a raylet runs: its address, and what a command is prefixed with to run there."""

    name: str
    address: str
    num_cpus: int
    inside: tuple[str, ...] = ()


class Cluster:
    """A Ray head and further hosts; ended, whatever happened to them, when the block is left.

    `environment` is what a driver needs to join, on the head's host. `settings` are environment variables of all.
    `head_arguments` of the cluster's address go to `ray start` of the head. `sessions` has a folder for each host, in
    which Ray keeps its logs.
    """

    def __init__(
        self,
        folder: Path,
        head: Host,
        settings: Mapping[str, str] | None = None,
        head_arguments: Callable[[str], Sequence[str]] = lambda address: (),
    ) -> None:
        self.folder = folder
        self.head = head
        self._gcs, self._dashboard, self._client = free_ports(3)
        self.dashboard = f"http://{head.address}:{self._dashboard}"
        self.environment = ray_environment(f"{head.address}:{self._gcs}") | {"NO_PROXY": "*", "no_proxy": "*"}
        self.environment |= NOT_NICE | dict(settings or {})
        self._head_arguments = head_arguments(self.environment["RAY_ADDRESS"])
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        # The paths of Ray's sockets lie below this folder, and Linux allows them 107 bytes.
        self.sessions = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.sessions, ignore_errors=True)

    def start(self, *hosts: Host) -> None:
        """Start raylets, the head first if it is among them; returns when all have joined."""
        heads = [host for host in hosts if host == self.head]
        for group in (heads, [host for host in hosts if host not in heads]):
            logs = {host: self._start(host) for host in group}
            for host, log in logs.items():
                wait_for(partial(_says_that_it_started, log), START_SECONDS, self._processes[host.name], log)

    def kill(self, *hosts: Host) -> None:
        """SIGKILL everything that runs on these hosts, as if their power had failed; all hosts when none is named."""
        names = [host.name for host in hosts] or list(self._processes)
        kill_all(self.processes(*hosts))
        for name in names:
            self._processes.pop(name).wait(END_SECONDS)

    def running(self) -> set[str]:
        """Names of the hosts that were started, and not killed by us."""
        return set(self._processes)

    def processes(self, *hosts: Host) -> list[psutil.Process]:
        """Everything that runs on these hosts, or on all when none is named: raylets, agents, workers."""
        found = []
        for name in [host.name for host in hosts] or self._processes:
            if (process := self._processes.get(name)) is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    root = psutil.Process(process.pid)
                    found += [root, *root.children(recursive=True)]
        return found

    def _start(self, host: Host) -> Path:
        session = self.sessions / host.name
        shutil.rmtree(session, ignore_errors=True)
        command = ["ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={host.address}"]
        if host == self.head:
            command += ["--head", f"--port={self._gcs}", f"--ray-client-server-port={self._client}"]
            command += ["--include-dashboard=true", f"--dashboard-host={host.address}"]
            command += [f"--dashboard-port={self._dashboard}", *self._head_arguments]
        else:
            command += [f"--address={self.environment['RAY_ADDRESS']}"]
        command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--temp-dir={session}", f"--num-cpus={host.num_cpus}", "--num-gpus=0"]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
        log = self.folder / f"ray-{host.name}.log"
        with log.open("wb") as output:
            self._processes[host.name] = subprocess.Popen(
                [*host.inside, *command],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return log


def _says_that_it_started(log: Path) -> bool:
    return _STARTED in log.read_text(errors="replace")


# -- processes -------------------------------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """From now on a descendant whose parent dies becomes a child of this process: `descendants` misses none."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def descendants() -> list[psutil.Process]:
    """All processes that this one started, directly or not, and that have not ended."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    victims = list(processes)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(victims, timeout=END_SECONDS)


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """After the block every descendant of this process has ended, those that it lost sight of too."""
    adopt_orphans()
    try:
        yield
    finally:
        while left := descendants():
            kill_all(left)


def wait_for(
    is_time: Callable[[], bool],
    seconds: float,
    process: "subprocess.Popen[bytes] | None" = None,
    log: Path | None = None,
) -> None:
    """Return once it is time; raises `ClusterError` when `process` ends before, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_time():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            reported = log.read_text(errors="replace")[-3000:] if log is not None else ""
            raise ClusterError(f"{'It ended' if ended else f'Nothing for {seconds:.0f} s'}. {reported}")
        time.sleep(_POLL_SECONDS)
