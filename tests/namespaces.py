"""Hosts on one machine that share nothing but its files: each a network namespace with an address and a name.

A cable can be pulled: packets are then lost without a word, as when a switch or a machine fails.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.hosts import Host, kill_all

NETWORK = "10.77.0"
SHARED_MEMORY = "512m"
_INSIDE = """
hostname "$0" && mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/resolv.conf" /etc/resolv.conf &&
mount -t tmpfs -o "size=$2" tmpfs /dev/shm && shift 2 && exec "$@"
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def reason_to_skip() -> str:
    """Why this process cannot make network namespaces; '' if it can."""
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
        return f"needs bridges, veth pairs and unshare: {getattr(error, 'stderr', error)}"
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
        ends = ((self._names[host.name], "eth0"), (self._names[self.hosts[0].name], host.name))
        limit = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "400ms")
        for name, device in ends:
            ip("netns", "exec", name, "tc", "qdisc", "add", "dev", device, *limit)
        try:
            yield
        finally:
            for name, device in ends:
                ip("netns", "exec", name, "tc", "qdisc", "del", "dev", device, "root")

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
