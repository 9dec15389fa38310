"""What the driver does to its own actors, on a real Ray."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ft_service.cluster import kill_actors

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).resolve().parents[1]
SECONDS = 60


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    environment = {
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")])
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(address="local", num_cpus=1, include_dashboard=False, runtime_env={"env_vars": environment})
        try:
            yield
        finally:
            ray.shutdown()


class Controller:
    def run(self) -> None:
        threading.Event().wait()


class Other:
    def answer(self) -> str:
        return "here"


def test_a_killed_actor_leaves_nobody_waiting_and_others_live(one_cpu: None) -> None:
    make = ray.remote(num_cpus=0)
    controller, other = make(Controller).remote(), make(Other).remote()
    assert ray.get(other.answer.remote()) == "here"
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            ray.get(controller.run.remote())
        except ray.exceptions.RayActorError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    kill_actors("Controller")
    waiting.join(SECONDS)
    assert not waiting.is_alive() and errors
    assert ray.get(other.answer.remote()) == "here"
    kill_actors("Controller")  # there is none any more
