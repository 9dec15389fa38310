"""The history of a run, from its events."""

from ft_service.runs.events import CheckpointSaved, Event, Notice, Published, Recovering, TrainingStarted, WorkerPlace
from ft_service.runs.history import attempts, wasted_steps

PREPARING = Notice(type="preparing", message="")


def training(step: int, workers: int = 2, repeated: int = 0) -> Event:
    places = [WorkerPlace(host=f"h{rank % 2}", pid=rank) for rank in range(workers)]
    return TrainingStarted(message="", step=step, workers=places, repeated=repeated)


def test_each_attempt_has_its_start_and_its_end() -> None:
    found = attempts(
        [
            PREPARING,
            training(0),
            CheckpointSaved(message="", step=50),
            Recovering(message="worker 1 was killed", step=50, failures=1),
            training(50, workers=3, repeated=7),
            Notice(type="moving", message="A node is draining"),
            training(60, workers=1),
            Published(message="", digest="ab"),
            Notice(type="succeeded", message=""),
        ]
    )
    assert [(a.step, a.workers, a.repeated, a.ended) for a in found] == [
        (0, 2, 0, "worker 1 was killed"),
        (50, 3, 7, "A node is draining"),
        (60, 1, 0, "Complete."),
    ]
    assert found[0].hosts == ["h0", "h1"]
    assert wasted_steps(found) == 7


def test_an_attempt_without_an_end_means_the_driver_died() -> None:
    found = attempts([PREPARING, training(0), PREPARING, training(20, repeated=4)])
    assert [attempt.ended for attempt in found] == ["The job's driver died.", ""]


def test_only_training_opens_an_attempt_that_a_stop_ends() -> None:
    assert attempts([PREPARING, Notice(type="failed", message="no such base")]) == []
    assert attempts([training(0), Notice(type="stopped", message="ft stop")])[0].ended == "ft stop"
