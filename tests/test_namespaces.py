"""The hosts of tests across a network: what their cables do to packets, and that nothing of them is left."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.hosts import Host, wait_for
from tests.namespaces import Network, needs_hosts, network

pytestmark = pytest.mark.multiprocess

PORT = 9
SECONDS = 20
DELAY = 0.02
BYTES = 4 * 2**20
_SO_RCVBUFFORCE = 33


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    needs_hosts()
    with network(tmp_path_factory.mktemp("network"), {"switch": 0, "a": 1, "b": 1}) as found:
        yield found


class Pair:
    """A host that sends datagrams to another."""

    def __init__(self, hosts: Network, sender: Host, receiver: Host) -> None:
        self.sender, self.receiver = (hosts.socket(host, socket.SOCK_DGRAM) for host in (sender, receiver))
        self.receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 * 2**20)
        self.receiver.bind((receiver.address, PORT))
        self.sender.bind((sender.address, PORT))
        self.sender.connect((receiver.address, PORT))
        self.receiver.connect((sender.address, PORT))
        for one in (self.sender, self.receiver):
            one.settimeout(SECONDS)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.sender.close()
        self.receiver.close()

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.sender.send(payload)

    def arrived(self) -> list[bytes]:
        """What waits to be read."""
        found = []
        self.receiver.setblocking(False)
        try:
            while True:
                found.append(self.receiver.recv(65536))
        except BlockingIOError:
            return found
        finally:
            self.receiver.settimeout(SECONDS)

    def round_trip(self) -> float:
        """Seconds until an answer has come."""
        began = time.monotonic()
        self.sender.send(b"ask")
        assert self.receiver.recv(16) == b"ask"
        self.receiver.send(b"answer")
        assert self.sender.recv(16) == b"answer"
        return time.monotonic() - began


@pytest.fixture
def pair(hosts: Network) -> Iterator[Pair]:
    """After a first round trip: both know where the other is."""
    _, a, b = hosts.hosts
    with Pair(hosts, a, b) as found:
        found.round_trip()
        yield found


def numbered(count: int, size: int = 8) -> list[bytes]:
    return [number.to_bytes(size, "little") for number in range(count)]


def transfer(hosts: Network, sender: Host, receiver: Host, data: bytes) -> tuple[bytes, float]:
    """Over TCP: what arrives, and after how many seconds."""
    with hosts.socket(receiver, socket.SOCK_STREAM) as listening, hosts.socket(sender, socket.SOCK_STREAM) as sending:
        listening.bind((receiver.address, 0))
        listening.listen()
        sending.settimeout(SECONDS)
        sending.connect(listening.getsockname())
        taken, _ = listening.accept()
        began = time.monotonic()
        found = bytearray()
        with taken:
            sending.setblocking(False)
            taken.setblocking(False)
            left = memoryview(data)
            while len(found) < len(data):
                assert time.monotonic() - began < SECONDS
                with contextlib.suppress(BlockingIOError):
                    left = left[sending.send(left) :] if left else left
                with contextlib.suppress(BlockingIOError):
                    found += taken.recv(2**20)
        return bytes(found), time.monotonic() - began


def test_a_sound_cable_loses_nothing(pair: Pair) -> None:
    pair.send(*numbered(500))
    assert [pair.receiver.recv(16) for _ in range(500)] == numbered(500)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_a_lossy_cable_loses_its_share_and_counts_it(hosts: Network, pair: Pair, share: float) -> None:
    num_sent = 4000
    with hosts.lossy(hosts.hosts[2], share) as lost:
        pair.send(*numbered(num_sent))
        found: list[bytes] = []

        def is_all_accounted_for() -> bool:
            found.extend(pair.arrived())
            return len(found) + lost() >= num_sent

        wait_for(is_all_accounted_for, SECONDS)
    margin = 6 * (num_sent * share * (1 - share)) ** 0.5
    assert abs(num_sent - len(found) - num_sent * share) < margin
    assert found == sorted(found, key=lambda payload: int.from_bytes(payload, "little"))
    pair.send(*numbered(500))
    assert [pair.receiver.recv(16) for _ in range(500)] == numbered(500)


def test_a_delayed_cable_takes_its_time_both_ways_and_changes_nothing(hosts: Network, pair: Pair) -> None:
    _, a, b = hosts.hosts
    with hosts.delayed(b, DELAY):
        assert min(pair.round_trip() for _ in range(3)) >= 2 * DELAY
        pair.send(*numbered(100, size=8000))  # each in several frames
        assert [pair.receiver.recv(16000) for _ in range(100)] == numbered(100, size=8000)
        data = os.urandom(BYTES)
        assert transfer(hosts, a, b, data)[0] == data
        assert transfer(hosts, b, a, data)[0] == data
    pair.round_trip()  # the relay has ended


def test_a_slow_cable_keeps_its_rate(hosts: Network) -> None:
    _, a, b = hosts.hosts
    data = os.urandom(BYTES)
    with hosts.slow(b, "40mbit"):
        found, seconds = transfer(hosts, a, b, data)
    assert found == data
    assert seconds >= (BYTES - 2 * 256 * 1024) * 8 / 40e6


def test_a_cable_can_be_bad_in_all_ways_at_once(hosts: Network) -> None:
    _, a, b = hosts.hosts
    data = os.urandom(BYTES // 8)
    with hosts.lossy(b, 0.02) as lost, hosts.slow(b, "100mbit"), hosts.delayed(b, 0.002):
        assert transfer(hosts, a, b, data)[0] == data
        assert transfer(hosts, b, a, data)[0] == data
        assert lost() > 0
    assert transfer(hosts, a, b, data)[0] == data


def test_nothing_comes_through_a_pulled_cable(hosts: Network, pair: Pair) -> None:
    b = hosts.hosts[2]
    hosts.pull_cable(b)
    pair.send(*[b"into the dark"] * 50)
    hosts.plug_in(b)
    pair.send(b"again")
    assert pair.receiver.recv(16) == b"again"


def names() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_nothing_is_left_of_hosts_whose_test_fails(hosts: Network, tmp_path: Path) -> None:
    before = names()
    processes: list[psutil.Process] = []
    with pytest.raises(ZeroDivisionError), network(tmp_path, {"other": 0, "x": 1}) as found:
        x = found.hosts[1]
        with found.lossy(x, 0.1), found.slow(x, "10mbit"), found.delayed(x, 0.001):
            subprocess.Popen([*x.inside, "sleep", "1000"])
            wait_for(lambda: len(found.processes(x)) > 0, SECONDS)
            processes = [*found.processes(found.hosts[0]), *found.processes(x)]
            assert len(processes) >= 2 and len(names().splitlines()) == len(before.splitlines()) + 2
            raise ZeroDivisionError
    assert names() == before
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
