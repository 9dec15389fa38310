"""Hosts on one machine that share nothing but its files: each a network namespace with an address and a name.

A cable can be pulled: packets are then lost without a word, as when a switch or a machine fails. It can also be limited
in its rate, lose some packets, or delay all of them.
"""

import ctypes
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.hosts import ROOT, Host, kill_all
from tests.needs import needs

NETWORK = "10.77.0"
SHARED_MEMORY = "512m"
_CLONE_NEWNET = 0x40000000
_LOST = re.compile(r"counter packets (\d+)")
_INSIDE = """
hostname "$0" && mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/resolv.conf" /etc/resolv.conf &&
mount -t tmpfs -o "size=$2" tmpfs /dev/shm && shift 2 && exec "$@"
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def _inside(namespace: str, *command: str) -> str:
    """Run it there; returns what it prints."""
    command = ("ip", "netns", "exec", namespace, *command)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def _limit(rate: str) -> tuple[str, ...]:
    return ("rate", rate, "burst", "256kb", "latency", "400ms")


def _table(device: str) -> str:
    return f"loss_{device}"


def _loss(device: str, share: float) -> str:
    """For nft: drop this share of the packets that arrive at a device."""
    hook = f'type filter hook ingress device "{device}" priority 0'
    drop = f"numgen random mod 1000 < {round(share * 1000)} counter drop"
    return f"add table netdev {_table(device)} {{ chain loss {{ {hook}; {drop}; }}; }}"


def needs_hosts() -> None:
    """End the test here unless this process can make them."""
    reason = _why_not()
    needs(not reason, reason)


def _why_not() -> str:
    """Why this process cannot make hosts with cables that lose and delay packets; '' if it can."""
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    name = f"ft-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
    except FileNotFoundError:
        return "needs the ip command (iproute2)"
    except subprocess.CalledProcessError as error:
        return f"needs the right to make network namespaces: {error.stderr.strip()}"
    try:
        ip("-n", name, "link", "add", "bridge0", "type", "bridge")
        ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two")
        _inside(name, "tc", "qdisc", "add", "dev", "one", "root", "tbf", *_limit("1mbit"))
        _inside(name, "nft", _loss("one", 0.5))
        subprocess.run(
            [
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "--uts",
                "--ipc",
                "sh",
                "-c",
                "hostname x && mount -t tmpfs x /dev/shm",
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        return f"needs bridges, veth pairs, tbf, nft (nftables) and unshare: {getattr(error, 'stderr', error)}"
    finally:
        ip("netns", "del", name)
    return ""


class Network:
    """Hosts at one switch, which is in the first one's namespace."""

    def __init__(self, folder: Path, num_cpus: dict[str, int]) -> None:
        """`num_cpus` are those that each host offers, by its name."""
        self._names = {name: f"ft-{os.getpid()}-{name}" for name in num_cpus}
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(num_cpus, start=1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "resolv.conf").touch()  # a name server that does not answer would be waited for at each connection
        shell = ("unshare", "--uts", "--ipc", "sh", "-c", _INSIDE)
        self.hosts = [
            Host(
                name,
                address,
                num_cpus[name],
                ("ip", "netns", "exec", self._names[name], *shell, name, str(folder), SHARED_MEMORY),
            )
            for name, address in addresses.items()
        ]

    def build(self) -> None:
        switch, *others = self.hosts
        at = self._names[switch.name]
        for name in self._names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "dev", "lo", "up")
        ip("-n", at, "link", "add", "bridge0", "type", "bridge")
        ip("-n", at, "addr", "add", f"{switch.address}/24", "dev", "bridge0")
        ip("-n", at, "link", "set", "dev", "bridge0", "up")
        ip("-n", at, "route", "add", "default", "dev", "bridge0")  # Ray looks for the address that leads out
        for host in others:
            name = self._names[host.name]
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", host.name, "netns", at)
            ip("-n", at, "link", "set", "dev", host.name, "master", "bridge0", "up")
            ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "dev", "eth0", "up")
            ip("-n", name, "route", "add", "default", "via", switch.address)

    def pull_cable(self, host: Host) -> None:
        """Of any but the first."""
        ip("-n", self._names[self.hosts[0].name], "link", "set", "dev", host.name, "down")

    def plug_in(self, host: Host) -> None:
        ip("-n", self._names[self.hosts[0].name], "link", "set", "dev", host.name, "up")

    @contextmanager
    def slow(self, host: Host, rate: str) -> Iterator[None]:
        """Meanwhile its cable (of any but the first) carries so much in either direction, such as ``400mbit``."""
        for name, device in self._ends(host):
            _inside(name, "tc", "qdisc", "add", "dev", device, "root", "tbf", *_limit(rate))
        try:
            yield
        finally:
            for name, device in self._ends(host):
                _inside(name, "tc", "qdisc", "del", "dev", device, "root")

    @contextmanager
    def lossy(self, host: Host, share: float) -> Iterator[Callable[[], int]]:
        """Meanwhile its cable (of any but the first) loses this share of the packets that arrive at either end.

        Yields what counts the packets lost so far.
        """
        for name, device in self._ends(host):
            _inside(name, "nft", _loss(device, share))

        def lost() -> int:
            tables = (_inside(name, "nft", f"list table netdev {_table(device)}") for name, device in self._ends(host))
            return sum(int(count) for table in tables for count in _LOST.findall(table))

        try:
            yield lost
        finally:
            for name, device in self._ends(host):
                _inside(name, "nft", f"delete table netdev {_table(device)}")

    @contextmanager
    def delayed(self, host: Host, seconds: float) -> Iterator[None]:
        """Meanwhile its cable (of any but the first) takes so long in either direction."""
        at = self._names[self.hosts[0].name]
        near, far, switch = (f"{end}-{host.name}" for end in ("near", "far", "sw"))
        command = ["ip", "netns", "exec", at, sys.executable, "-m", "tests.delayed_cable", near, far, str(seconds)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as relay:
            try:
                assert relay.stdout is not None and relay.stdout.readline(), "the relay ended before it was up"
                ip("-n", at, "link", "add", switch, "type", "bridge")
                ip("-n", at, "link", "set", "dev", switch, "up")
                ip("-n", at, "link", "set", "dev", near, "master", "bridge0", "up")
                ip("-n", at, "link", "set", "dev", far, "master", switch, "up")
                ip("-n", at, "link", "set", "dev", host.name, "master", switch)
                yield
            finally:
                relay.kill()
                ip("-n", at, "link", "set", "dev", host.name, "master", "bridge0")
                subprocess.run(["ip", "-n", at, "link", "del", switch], capture_output=True, timeout=20)

    def _ends(self, host: Host) -> tuple[tuple[str, str], tuple[str, str]]:
        """Namespace and device of both ends of its cable."""
        return (self._names[host.name], "eth0"), (self._names[self.hosts[0].name], host.name)

    def socket(self, host: Host, kind: socket.SocketKind) -> socket.socket:
        """A socket of this process that sends and receives as a process on that host does."""

        def make() -> socket.socket:
            with Path("/run/netns", self._names[host.name]).open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            return socket.socket(socket.AF_INET, kind)

        with ThreadPoolExecutor(1) as one_thread:  # only that thread is in the namespace
            return one_thread.submit(make).result()

    def processes(self, host: Host) -> list[psutil.Process]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self._names[host.name]], capture_output=True, text=True, timeout=20
        ).stdout.split()
        found = []
        for pid in map(int, listed):
            try:
                found.append(psutil.Process(pid))
            except psutil.NoSuchProcess:
                continue
        return found

    def host_of(self, pid: int) -> str:
        """Name of the host in whose namespace a process is; '' for none of them."""
        inode = os.stat(f"/proc/{pid}/ns/net").st_ino
        return next((h for h, name in self._names.items() if os.stat(f"/run/netns/{name}").st_ino == inode), "")

    def remove(self) -> None:
        """End what still runs on the hosts, and delete them."""
        for host in self.hosts:
            while left := self.processes(host):
                kill_all(left)
        for name in self._names.values():
            if Path("/run/netns", name).exists():
                ip("netns", "del", name)


@contextmanager
def network(folder: Path, num_cpus: dict[str, int]) -> Iterator[Network]:
    found = Network(folder, num_cpus)
    try:
        found.build()
        yield found
    finally:
        found.remove()


def connections(pid: int) -> list[tuple[str, str]]:
    """(own address, other's address) of the established TCP connections of a process, in whatever namespace it is."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            own, other, state, inode = (line.split()[i] for i in (1, 2, 3, 9))
            if state == "01" and f"socket:[{inode}]" in inodes:
                found.append((_address(own), _address(other)))
    return found


def _address(text: str) -> str:
    """``0100007F:1F90`` or the IPv6 form of a mapped address, dotted."""
    digits = text.partition(":")[0][-8:]
    return ".".join(str(int(digits[i : i + 2], 16)) for i in (6, 4, 2, 0))


def run_inside(host: Host, command: Sequence[str], **how: object) -> "subprocess.CompletedProcess[str]":
    done: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
        [*host.inside, *command], capture_output=True, text=True, timeout=60, **how
    )
    return done
