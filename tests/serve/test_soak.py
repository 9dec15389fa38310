"""What the soak of the serving benchmark excuses, and when it holds."""

from typing import Any

import pytest

from benchmarks.serving.soak import Failure, holds, is_excused

KILLED = 100.0
CUT: dict[str, Any] = {
    "request_id": "a",
    "asked": 99.0,
    "has_begun": True,
    "failed": 100.2,
    "reason": "the replica has died",
}


def test_an_answer_that_the_killed_replica_had_begun_is_excused():
    assert is_excused(Failure(**CUT), KILLED, ended_on_a_replica={"b"})


@pytest.mark.parametrize(
    ("change", "killed", "ended"),
    [
        ({"has_begun": False}, KILLED, set()),  # it could have been asked again
        ({"asked": 100.1}, KILLED, set()),  # after the kill
        ({"failed": 99.5}, KILLED, set()),  # before the kill
        ({}, KILLED, {"a"}),  # on another replica
        ({}, None, set()),  # nothing was killed
    ],
)
def test_any_other_failure_counts(change, killed, ended):
    assert not is_excused(Failure(**{**CUT, **change}), killed, ended)


GOOD = {"answered": 5, "published": 3, "deleted": 1, "failed": 0, "killed": 1, "replicas_at_end": 2}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"failed": 1}, False),
        ({"deleted": 0}, False),
        ({"published": 0}, False),
        ({"answered": 0}, False),
        ({"killed": 0}, False),
        ({"replicas_at_end": 1}, False),
    ],
)
def test_a_soak_holds_only_if_all_of_it_happened_and_nothing_failed(change, expected):
    assert holds({**GOOD, **change}) is expected
