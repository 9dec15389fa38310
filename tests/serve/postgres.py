"""A real Postgres of this machine, in a folder of its own, for tests of the database."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

_USER = "nobody"
_DEBIAN = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Postgres:
    """A server that can be stopped and started again."""

    programs: Path
    folder: Path
    port: int

    def url(self, name: str) -> str:
        return f"postgresql+pg8000://postgres@127.0.0.1:{self.port}/{name}"

    def new_database(self, name: str) -> str:
        """The URL of a new, empty database."""
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f'CREATE DATABASE "{name}"'))
        engine.dispose()
        return self.url(name)

    def start(self) -> None:
        """Returns once it answers."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=100"
        self._control("start", "-o", options, "-l", str(self.folder / "log"))

    def stop(self) -> None:
        """As a crash stops it: connections break at once."""
        self._control("stop", "-m", "immediate")

    def _control(self, action: str, *options: str) -> None:
        _run([self.programs / "pg_ctl", action, "-w", "-t", "120", "-D", self.folder / "data", *options])


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server. Skips the test where Postgres is not installed; in CI that is a failure."""
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="ft-postgres-"))
    try:
        if os.geteuid() == 0:  # which Postgres refuses
            shutil.chown(folder, _USER)
        data = folder / "data"
        options = ["-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
        _run([programs / "initdb", "-D", data, *options])
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        server = Postgres(programs, folder, port)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(_DEBIAN.glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "pg_ctl").exists():
            return folder
    if os.environ.get("CI"):
        pytest.fail("Postgres is not installed, and .ci/run installs it")
    pytest.skip("Postgres is not installed (Debian: apt install postgresql)")


def _run(command: list[str | Path]) -> None:
    user = {}
    if os.geteuid() == 0:
        entry = pwd.getpwnam(_USER)
        user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    # Not pipes: the server would keep them open, and waiting for their end would last as long as the server.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd="/", **user)  # type: ignore[call-overload]
        output.seek(0)
        assert done.returncode == 0, output.read().decode(errors="replace")
