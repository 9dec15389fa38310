"""The same votes on Debian's Postgres: the tests of SQLite again, and a server that goes away and comes back."""

import uuid
from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from serve.database.database import open_database
from serve.database.keys import create_key, find_key, list_keys, revoke_key
from serve.database.tables import Base
from tests.serve.postgres import Postgres, postgres
from tests.serve.voting.test_votes import (
    code,
    test_a_double_click_counts_once_and_the_first_outcome_stays,
    test_a_repeat_is_void_once_its_models_are_known,
    test_a_storage_that_is_away_is_a_503_and_no_vote,
    test_a_vote_is_in_the_database_and_on_storage_and_shows_the_next_comparison,
    test_after_the_end_no_vote_is_taken_and_models_can_be_seen,
    test_asking_for_the_models_before_the_vote_makes_it_void,
    test_fifty_raters_at_once_lose_and_double_nothing,
    test_the_last_vote_can_be_withdrawn_and_given_again_and_a_late_copy_of_it_does_not_count,
    test_the_tables_are_the_same_after_a_rebuild_into_a_new_database,
    votes_in,
    voting,
)
from tests.serve.voting.voting_world import Rater

pytestmark = pytest.mark.multiprocess  # the server's

__all__ = [
    "test_a_double_click_counts_once_and_the_first_outcome_stays",
    "test_a_repeat_is_void_once_its_models_are_known",
    "test_a_storage_that_is_away_is_a_503_and_no_vote",
    "test_a_vote_is_in_the_database_and_on_storage_and_shows_the_next_comparison",
    "test_after_the_end_no_vote_is_taken_and_models_can_be_seen",
    "test_asking_for_the_models_before_the_vote_makes_it_void",
    "test_fifty_raters_at_once_lose_and_double_nothing",
    "test_the_last_vote_can_be_withdrawn_and_given_again_and_a_late_copy_of_it_does_not_count",
    "test_the_tables_are_the_same_after_a_rebuild_into_a_new_database",
]


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def database(server) -> str:
    return server.new_database(f"test-{uuid.uuid4().hex[:8]}")


def test_migrations_make_the_tables_that_the_code_expects(database):
    with open_database(database).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_keys_work(database):
    engine = open_database(database)
    key, record = create_key(engine, "ci", models=("tiny",))
    assert find_key(engine, key) == record
    revoke_key(engine, "ci")
    assert [one.revoked is None for one in list_keys(engine)] == [False]


def test_a_server_that_goes_away_is_a_503_without_a_vote_and_may_come_back(server, tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    server.stop()
    try:
        response = rater.vote(first)
        assert code(response) == (503, "votes_unavailable") and "postgres" not in response.text
        assert code(rater.state()) == (503, "votes_unavailable")
        assert not (tmp_path / "storage/studies/desk/votes").exists()
    finally:
        server.start()
    assert rater.vote(first).json()["done"] == 1
    assert votes_in(database) == {first["id"]: "left"}


def test_a_text_that_postgres_cannot_keep_is_kept_without_it(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    assert rater.vote(first, note="a\x00b").json()["done"] == 1
    (vote,), _, _ = made.folder.votes_of("desk-r0")
    assert vote.note == "ab"


def test_opening_needs_no_more_rights_than_its_own_database(server, database):
    open_database(database)
    with create_engine(database).connect() as connection:
        tables = connection.exec_driver_sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        assert {"studies", "study_votes", "alembic_version"} <= {name for (name,) in tables}
