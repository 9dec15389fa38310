"""A driver outlives the process that Ray knows, hears its signals, and tells it how it ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

PROGRAM = """
import os, signal, sys, time
sys.path.insert(0, {project!r})
from ft_service.cluster.detach import detach
from ft_service.errors import FtError
with detach():
    open({folder!r} + "/pid", "w").write(str(os.getpid()))
    {body}
"""
UNTIL_TOLD = """
    received = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append("TERM"))
    signal.signal(signal.SIGINT, lambda number, frame: received.append("INT"))
    os.rename({folder!r} + "/pid", {folder!r} + "/ready")
    deadline = time.monotonic() + 60
    while not os.path.exists({folder!r} + "/end") and time.monotonic() < deadline:
        open({folder!r} + "/received.partial", "w").write(" ".join(received))
        os.rename({folder!r} + "/received.partial", {folder!r} + "/received")
        time.sleep(0.01)
    sys.exit(3)
"""
PROJECT = str(Path(__file__).parents[2])


def start(folder: Path, body: str) -> "subprocess.Popen[str]":
    program = PROGRAM.format(project=PROJECT, folder=str(folder), body=body.format(folder=str(folder)))
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(is_time: object) -> None:
    deadline = time.monotonic() + 60
    while not is_time():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def received(folder: Path) -> str:
    file = folder / "received"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize(
    ("body", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), ("1 / 0", 1), ("os.kill(os.getpid(), 9)", 1)],
)
def test_the_exit_code_is_that_of_the_driver(tmp_path: Path, body: str, code: int) -> None:
    process = start(tmp_path, body)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == code, printed
    assert int((tmp_path / "pid").read_text()) != process.pid
    if "kill" in body:
        assert "the driver was killed" in printed


def test_each_signal_reaches_the_driver_once(tmp_path: Path) -> None:
    process = start(tmp_path, UNTIL_TOLD)
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: received(tmp_path) == "TERM")
    process.kill()  # as Ray does, three seconds after its SIGTERM
    process.wait()
    driver = int((tmp_path / "ready").read_text())
    assert os.path.exists(f"/proc/{driver}")
    (tmp_path / "end").touch()
    wait_for(lambda: not os.path.exists(f"/proc/{driver}"))
    assert received(tmp_path) == "TERM"


def test_killing_the_proxy_stops_the_driver(tmp_path: Path) -> None:
    process = start(tmp_path, UNTIL_TOLD)
    wait_for((tmp_path / "ready").exists)
    process.kill()
    process.wait()
    wait_for(lambda: received(tmp_path) == "TERM")
    (tmp_path / "end").touch()


def test_the_driver_is_no_descendant_of_the_proxy(tmp_path: Path) -> None:
    import psutil

    process = start(tmp_path, UNTIL_TOLD)
    wait_for((tmp_path / "ready").exists)
    driver = int((tmp_path / "ready").read_text())
    assert driver not in {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    assert os.getsid(driver) != os.getsid(process.pid)
    (tmp_path / "end").touch()
    process.wait(timeout=60)
    assert process.returncode == 3
