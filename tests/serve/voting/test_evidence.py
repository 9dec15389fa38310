"""The number of votes about an adapter, which a promotion may ask for."""

from fastapi.testclient import TestClient

from serve.database.database import open_database
from serve.voting.evidence import num_votes_about
from serve.voting.studies import delete_rater
from tests.serve.voting.voting_world import Rater, make_study, voting_api


def test_only_votes_that_count_and_compare_the_adapter_are_counted(tmp_path):
    database = f"sqlite:///{tmp_path}/service.db"
    storage = tmp_path / "storage"
    made = make_study(open_database(database), storage, questions=6, controls=2, attention=1, repeats=0.5)
    client = TestClient(voting_api(database, str(storage), api_key="a-key"))
    assert num_votes_about(made.storage, "a" * 64) == 0
    anna = Rater(client, made.token("anna"))
    done = anna.vote_all()
    assert len(done) > 6  # with repeats, controls and attention items
    assert num_votes_about(made.storage, "a" * 64) == 6
    assert num_votes_about(made.storage, "c" * 64) == 0
    other = make_study(made.engine, storage, name="other", questions=3)
    bert = Rater(client, other.token("bert"))
    first = bert.state().json()["comparison"]
    bert.vote(first)
    assert num_votes_about(made.storage, "a" * 64) == 7
    bert.withdraw(first["id"])
    assert num_votes_about(made.storage, "a" * 64) == 6
    delete_rater(made.engine, made.storage, made.study.name, "anna")
    assert num_votes_about(made.storage, "a" * 64) == 0
