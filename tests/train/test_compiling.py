"""Compiling operators: others wait for a living compiler, and a dead one leaves no lock."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import ninja
import psutil
import pytest

from ft_service.train.compiling import FlockBaton, compile_with_installed_ninja

EXTENSION = """
#include <torch/extension.h>
int seven() { return 7; }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("seven", &seven); }
"""
BUILD = """
import sys
from ft_service.train.parallel import prepare_process
from torch.utils.cpp_extension import load
prepare_process(use_gpu=False)
print(load(name="seven", sources=[sys.argv[1]], build_directory=sys.argv[2]).seven())
"""


def test_another_ninja_on_the_path_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = tmp_path / "ninja"
    older.write_text("#!/bin/sh\necho 1.11.1\n")
    older.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        compile_with_installed_ninja()
    assert os.environ["PATH"].split(os.pathsep) == [ninja.BIN_DIR, str(tmp_path)]
    assert shutil.which("ninja") == str(Path(ninja.BIN_DIR) / "ninja")


@pytest.mark.multiprocess
def test_stale_lock_of_a_killed_compiler_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "seven.cpp").write_text(EXTENSION)
    (tmp_path / "lock").touch()  # what torch's own lock is, after its process was killed
    command = [sys.executable, "-c", BUILD, str(tmp_path / "seven.cpp"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-1:] == ["7"], done.stderr
    assert not (tmp_path / "lock").exists()


@pytest.mark.multiprocess
def test_compilers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "seven.cpp").write_text(EXTENSION)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "seven.cpp"), str(tmp_path)]
    builder = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert "Compiling" in builder.stdout.readline()
        compilers: list[psutil.Process] = []
        while not any("seven" in " ".join(arguments_of(each)) for each in compilers):
            assert builder.is_running()
            compilers = builder.children(recursive=True)
    finally:
        builder.kill()
        builder.wait()
    assert psutil.wait_procs(compilers, timeout=30)[1] == []


def arguments_of(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def hold(path: str, reported: Connection) -> None:
    baton = FlockBaton(path)
    reported.send(baton.try_acquire())
    reported.recv()
    baton.release()


def wait(path: str, reported: Connection) -> None:
    reported.send(FlockBaton(path).try_acquire())
    FlockBaton(path).wait()
    reported.send("waited")


@pytest.mark.multiprocess
@pytest.mark.parametrize("is_killed", [False, True], ids=["released", "killed"])
def test_others_wait_until_the_builder_is_done_or_dead(tmp_path: Path, is_killed: bool) -> None:
    lock = tmp_path / "lock"
    spawn = multiprocessing.get_context("spawn")
    (holder, held), (waiter, waits) = spawn.Pipe(), spawn.Pipe()
    builder = spawn.Process(target=hold, args=(str(lock), held))
    other = spawn.Process(target=wait, args=(str(lock), waits))
    try:
        builder.start()
        assert holder.recv() is True
        other.start()
        assert waiter.recv() is False
        assert not waiter.poll(0.2)
        if is_killed:
            os.kill(builder.pid or 0, signal.SIGKILL)
        else:
            holder.send("go on")
        assert waiter.recv() == "waited"
        assert lock.exists() is is_killed
        assert FlockBaton(str(lock)).try_acquire()
    finally:
        for process in (builder, other):
            if process.pid is not None:
                process.kill()
                process.join()
