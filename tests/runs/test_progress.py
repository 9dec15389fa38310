"""Progress: one readable line, on a terminal and in a log."""

import io

from ft_service.runs.progress import LoadingLine, ProgressLine, format_progress
from tests.runs.run_cases import Clock, step_metrics


def test_progress_is_one_dense_line() -> None:
    assert format_progress(step_metrics(120), 1500, validation_loss=1.9021, seconds_left=723) == (
        "step  120/1500  loss 1.8342  val 1.9021  lr 1.8e-04  gnorm 0.74  41.2k tok/s  31.4 GiB  eta 12m03s"
    )


def test_progress_leaves_out_unknown_values() -> None:
    line = format_progress(step_metrics(1), 10, validation_loss=None, seconds_left=None)
    assert "val" not in line
    assert "eta" not in line


def shown_steps(stream: io.StringIO) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]


def test_a_log_shows_first_last_validated_and_periodic_steps() -> None:
    clock = Clock()
    stream = io.StringIO()
    progress = ProgressLine(12, stream, clock)
    for step in range(1, 13):
        progress(step_metrics(step, validation_loss=1.9 if step == 3 else None))
        clock.now += 1.0
    progress.close()
    # 1 is the first, 3 validates, 8 comes five seconds after it, 12 is the last.
    assert shown_steps(stream) == [1, 3, 8, 12]


def test_a_log_ends_with_the_last_step_of_a_stopped_run() -> None:
    stream = io.StringIO()
    progress = ProgressLine(100, stream, Clock())
    for step in (1, 2, 3):
        progress(step_metrics(step))
    progress.close()
    assert shown_steps(stream) == [1, 3]


def test_eta_uses_this_sessions_pace_and_keeps_the_last_validation() -> None:
    clock = Clock()
    stream = io.StringIO()
    progress = ProgressLine(100, stream, clock)
    progress(step_metrics(41, validation_loss=1.9021))
    clock.now = 20.0
    progress(step_metrics(51))
    # Ten steps took 20 s since the session began at step 41, so 49 more take 98 s.
    assert stream.getvalue().splitlines()[-1].endswith("eta 1m38s")
    assert "val 1.9021" in stream.getvalue().splitlines()[-1]


def test_a_terminal_shows_one_line_in_place() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = ProgressLine(2, stream, Clock())
    progress(step_metrics(1))
    progress(step_metrics(2))
    progress.close()
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().count("\n") == 1


def test_loading_ends_with_one_line() -> None:
    stream = io.StringIO()
    loading = LoadingLine(stream, Clock())
    for bytes_read in (2**29, 2**30, 2**30):  # this worker holds nothing of the last weight
        loading(bytes_read, 2**30)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "Loading: 1.00 of 1.00 GiB of weights by this worker"
    ]
