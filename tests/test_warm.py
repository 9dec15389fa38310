"""A process that starts warm is used as one that does not: by its output, its exit code and its signals."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.cluster  # where the server is that these tests share

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(warm: dict[str, str]) -> Start:
    environment = {**os.environ, **warm, "FT_WARM_COMMANDS": "-c"}

    def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_libraries_are_there_and_the_project_is_not(start: Start) -> None:
    printed, _ = start("import sys; print('torch' in sys.modules, 'ft_service' in sys.modules)").communicate()
    assert printed == "True False\n"


def test_arguments_output_and_exit_code_are_the_programs(start: Start) -> None:
    process = start("import sys; print(sys.argv); print('no', file=sys.stderr); sys.exit(3)", "a", "b c")
    assert process.communicate() == ("['-c', 'a', 'b c']\n", "no\n")
    assert process.returncode == 3


def test_an_error_ends_it_with_a_traceback(start: Start) -> None:
    process = start("1 / 0")
    _, errors = process.communicate()
    assert process.returncode == 1 and errors.endswith("ZeroDivisionError: division by zero\n")


def test_working_directory_and_environment_are_its_own(warm: dict[str, str], tmp_path: Path) -> None:
    code = "import os; print(os.getcwd(), os.environ['MINE'])"
    environment = {**os.environ, **warm, "FT_WARM_COMMANDS": "-c", "MINE": "yes"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert printed == f"{tmp_path} yes\n"


def test_a_signal_reaches_the_program(start: Start) -> None:
    process = start("import signal; signal.signal(15, lambda *_: exit(7)); print(1, flush=True); signal.pause()")
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    process.terminate()
    assert process.wait(60) == 7


def test_a_killed_program_ends_its_process_the_same_way(start: Start) -> None:
    assert start("import os; os.kill(os.getpid(), 9)").wait(60) == -signal.SIGKILL


def test_killing_the_process_kills_the_program(start: Start) -> None:
    process = start("import os, signal; print(os.getpid(), flush=True); signal.pause()")
    assert process.stdout is not None
    program = psutil.Process(int(process.stdout.readline()))
    process.kill()
    program.wait(60)
    assert not program.is_running()
