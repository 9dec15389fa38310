"""Each loss in each state of a job: nothing is lost, and nothing is started twice.

Ray and its drivers are stand-ins; database and storage are real. `test_real_faults` has the real losses of one job, and
`test_controller` kills the controller at each of its calls.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from ft_service.errors import DatabaseError
from serve.database import database
from serve.fine_tuning.controller import Controller
from serve.fine_tuning.job_records import Job
from tests.serve.fine_tuning.job_world import STEPS, World, make_world

STATES = (
    "accepted",
    "queued",
    "submitted",
    "started",
    "running",
    "pausing",
    "cancelling",
    "paused",
    "trained",
    "succeeded",
    "cancelled",
)
LOSSES = ("controller", "driver", "head", "all three", "database", "storage", "mount")
LOOKS_AWAY = 3


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(database, "_BUSY_MILLISECONDS", 20)
    monkeypatch.setattr("os.fsync", lambda file: None)  # no power fails here
    return make_world(tmp_path)


class Story:
    """A job, its controllers, and what was seen at each look."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.job = world.job()
        self.controller: Controller = world.controller()

    def look(self) -> Job:
        """One step of the controller. At no time there are two living submissions."""
        self.controller.step()
        assert len(self.world.ray.alive()) <= 1
        return self.world.find(self.job)

    def bring_to(self, state: str) -> None:
        world = self.world
        if state == "accepted":
            return
        world.until(self.job, "queued", self.controller)
        if state == "queued":
            return
        self.look()
        if state == "submitted":
            return
        world.ray.advance()
        if state == "started":
            return
        for _ in range(2):
            world.ray.advance()
            self.look()
        if state in ("pausing", "paused"):
            world.wish(self.job, "pause")
        elif state in ("cancelling", "cancelled"):
            world.wish(self.job, "cancel")
        elif state == "trained":
            for _ in range(STEPS):
                world.ray.advance()
        if state in ("paused", "cancelled", "succeeded"):
            world.until(self.job, state, self.controller)

    def lose(self, loss: str) -> None:
        if loss in ("driver", "all three"):
            self.world.ray.kill_drivers()
        if loss in ("head", "all three"):
            self.world.ray.lose_head()
        if loss in ("controller", "all three"):
            self.world.clock.forward(31)  # its lease expires
            self.controller = self.world.controller()
        if loss == "database":
            self._lose_database()
        if loss in ("storage", "mount"):
            self._lose_storage(is_empty=loss == "mount")

    def _lose_database(self) -> None:
        url = self.world.engine.url
        if url.get_backend_name() == "postgresql":
            for _ in range(LOOKS_AWAY):
                with self.world.engine.connect() as connection:  # ends all connections but this one
                    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                    connection.execute(text(f"{others} AND datname = current_database()"))
                self.look()
            return
        with closing(sqlite3.connect(str(url.database))) as other:
            other.execute("BEGIN IMMEDIATE")
            before = self.world.find(self.job)
            for _ in range(LOOKS_AWAY):
                with pytest.raises(DatabaseError, match="locked"):
                    self.controller.step()
            assert self.world.find(self.job) == before
            other.rollback()

    def _lose_storage(self, is_empty: bool) -> None:
        root = Path(self.world.storage.root)
        before = self.world.find(self.job)
        submitted = len(self.world.ray.submitted)
        root.rename(root.with_name("away"))
        if is_empty:
            root.mkdir()  # the folder of a mount, without it
        for _ in range(LOOKS_AWAY):
            self.controller.step()
        found = self.world.find(self.job)
        assert (found.attempt, found.wish) == (before.attempt, before.wish)
        assert found.state == before.state or (before.state, found.state) == ("validating_files", "queued")
        assert len(self.world.ray.submitted) == submitted
        if is_empty:
            for path in sorted(root.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            root.rmdir()
        assert not root.exists()
        root.with_name("away").rename(root)

    def check(self, state: str) -> None:
        """Let it go to its end, and compare with what a job is that has lost nothing."""
        world = self.world
        if state in ("pausing", "paused"):
            paused = world.until(self.job, "paused", self.controller)
            attempt = paused.attempt + 1 if paused.attempt else 0  # as `Jobs.resume` does
            assert world.records.change(paused, "queued", attempt=attempt) is not None
        is_cancelled = state in ("cancelling", "cancelled")
        for _ in range(40):
            done = self.look()
            if done.state in ("succeeded", "failed", "cancelled"):
                break
            world.ray.advance()
        assert done.state == ("cancelled" if is_cancelled else "succeeded"), (done, world.messages(self.job))
        trained = [step for _, step in world.ray.trained]
        reported = [event.data["step"] for event in world.records.events_since(self.job.id, None, 1000) if event.data]
        assert trained == reported == list(range(1, len(trained) + 1))
        assert is_cancelled or len(trained) == STEPS
        assert world.storage.folders("runs") == [self.job.run_id]
        assert len(world.records.due_webhooks(10)) == 1
        assert len(world.result_files) == (0 if is_cancelled else 1)
        assert world.ray.alive() == []
        last = "The job was cancelled." if is_cancelled else "The job has successfully completed"
        assert world.messages(self.job).count(last) == 1 and world.messages(self.job)[-1] == last


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("state", STATES)
def test_a_loss_in_any_state_loses_nothing_and_starts_nothing_twice(world: World, state: str, loss: str) -> None:
    story = Story(world)
    story.bring_to(state)
    story.lose(loss)
    story.check(state)


def test_a_driver_that_is_killed_again_and_again_fails_the_job_after_a_bounded_number(world: World) -> None:
    story = Story(world)
    story.bring_to("submitted")
    for _ in range(100):
        world.ray.kill_drivers()
        found = story.look()
        if found.state == "failed":
            break
    assert found.state == "failed" and found.error["code"] == "driver_lost"
    assert len(world.ray.submitted) == len(set(world.ray.submitted)) == 20
