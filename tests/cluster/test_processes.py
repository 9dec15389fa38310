"""Processes end with the one that started them, also where that is killed."""

import signal
import subprocess
import sys

import psutil
import pytest

from tests.hosts import ROOT

pytestmark = pytest.mark.multiprocess

END_SECONDS = 30
PARENT = """
import subprocess, sys, time
from ft_service.cluster.processes import end_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=end_with_parent(),
                         start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_child_ends_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs([child], END_SECONDS)
    assert alive == []
