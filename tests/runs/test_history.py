"""What a run lived through is told from its events."""

from ft_service.runs.history import attempts, wasted_steps
from ft_service.runs.metrics import Event


def event(type: str, message: str = "", **data: object) -> Event:
    return Event.model_validate({"time": None, "type": type, "message": message, **data})


def training(step: int, workers: int = 2, repeated: int = 0) -> Event:
    places = [{"host": f"h{rank % 2}", "pid": rank, "node": ""} for rank in range(workers)]
    return event("training", step=step, workers=places, repeated=repeated)


def test_each_attempt_has_its_beginning_and_its_end() -> None:
    found = attempts(
        [
            event("preparing"),
            training(0),
            event("checkpoint", step=50),
            event("recovering", "worker 1 was killed"),
            training(50, workers=3, repeated=7),
            event("moving", "A node is being taken away"),
            training(60, workers=1),
            event("published"),
            event("succeeded"),
        ]
    )
    assert [(a.step, a.workers, a.repeated, a.ended) for a in found] == [
        (0, 2, 0, "worker 1 was killed"),
        (50, 3, 7, "A node is being taken away"),
        (60, 1, 0, "Complete."),
    ]
    assert found[0].hosts == ["h0", "h1"]
    assert wasted_steps(found) == 7


def test_an_attempt_that_nobody_ended_was_its_drivers_death() -> None:
    found = attempts([event("preparing"), training(0), event("preparing"), training(20, repeated=4)])
    assert [attempt.ended for attempt in found] == ["The job's driver died.", ""]


def test_a_stop_ends_the_attempt_and_a_failure_before_training_none() -> None:
    assert attempts([event("preparing"), event("failed", "no such base")]) == []
    assert attempts([training(0), event("stopped", "ft stop")])[0].ended == "ft stop"
