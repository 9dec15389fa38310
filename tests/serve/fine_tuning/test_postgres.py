"""The same jobs on Debian's Postgres: the tests of SQLite again."""

import uuid
from collections.abc import Iterator

import pytest

from tests.serve.fine_tuning.job_world import World, make_world
from tests.serve.fine_tuning.test_controller import (
    test_a_database_that_is_away_for_a_while_loses_nothing,
    test_a_job_goes_through_its_states_and_succeeds_only_after_its_model_has_answered,
    test_a_lost_head_resubmits_under_the_same_run_id,
    test_ended_jobs_change_no_more_and_illegal_transitions_raise,
    test_identical_requests_at_once_create_one_job,
    test_of_two_controllers_one_acts_and_the_other_takes_over,
    test_pause_stops_with_a_checkpoint_and_resume_goes_on,
    test_the_same_request_gets_the_same_job_within_the_window,
)
from tests.serve.fine_tuning.test_losses import STATES, Story
from tests.serve.postgres import Postgres, postgres

pytestmark = pytest.mark.multiprocess  # the server's

__all__ = [
    "test_a_database_that_is_away_for_a_while_loses_nothing",
    "test_a_job_goes_through_its_states_and_succeeds_only_after_its_model_has_answered",
    "test_a_lost_head_resubmits_under_the_same_run_id",
    "test_ended_jobs_change_no_more_and_illegal_transitions_raise",
    "test_identical_requests_at_once_create_one_job",
    "test_of_two_controllers_one_acts_and_the_other_takes_over",
    "test_pause_stops_with_a_checkpoint_and_resume_goes_on",
    "test_the_same_request_gets_the_same_job_within_the_window",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as found:
        yield found


@pytest.fixture
def world(server: Postgres, tmp_path) -> Iterator[World]:
    made = make_world(tmp_path, server.new_database(uuid.uuid4().hex))
    yield made
    made.engine.dispose()


@pytest.mark.parametrize("state", STATES)
def test_connections_that_break_in_any_state_lose_nothing_and_start_nothing_twice(world: World, state: str) -> None:
    story = Story(world)
    story.bring_to(state)
    story.lose("database")
    story.check(state)
