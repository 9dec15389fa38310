"""The votes about an adapter, and how many it wins, which a promotion may ask for."""

from fastapi.testclient import TestClient

from serve.database.database import open_database
from serve.voting.evidence import votes_about
from serve.voting.studies import delete_rater
from tests.serve.voting.voting_world import Rater, make_study, voting_api


def test_only_votes_that_count_and_compare_the_adapter_are_counted(tmp_path):
    database = f"sqlite:///{tmp_path}/service.db"
    storage = tmp_path / "storage"
    made = make_study(open_database(database), storage, questions=6, controls=2, attention=1, repeats=0.5)
    client = TestClient(voting_api(database, str(storage), api_key="a-key"))
    assert votes_about(made.storage, "a" * 64).votes == 0
    anna = Rater(client, made.token("anna"))
    done = anna.vote_all()
    assert len(done) > 6  # with repeats, controls and attention items
    assert votes_about(made.storage, "a" * 64).votes == 6
    assert votes_about(made.storage, "c" * 64).votes == 0
    other = make_study(made.engine, storage, name="other", questions=3)
    bert = Rater(client, other.token("bert"))
    first = bert.state().json()["comparison"]
    bert.vote(first)
    assert votes_about(made.storage, "a" * 64).votes == 7
    bert.withdraw(first["id"])
    assert votes_about(made.storage, "a" * 64).votes == 6
    delete_rater(made.engine, made.storage, made.study.name, "anna")
    assert votes_about(made.storage, "a" * 64).votes == 0


def test_the_win_share_is_that_of_the_adapter_on_either_side(tmp_path):
    database = f"sqlite:///{tmp_path}/service.db"
    storage = tmp_path / "storage"
    made = make_study(open_database(database), storage, questions=10, controls=2, attention=1, repeats=0.5)
    rater = Rater(TestClient(voting_api(database, str(storage), api_key="a-key")), made.token("anna"))
    wins = 0.0
    for number in range(100):
        if (shown := rater.state().json()["comparison"]) is None:
            break
        of_the_adapter = "left" if shown["left"]["text"].startswith("good") else "right"
        outcome = [of_the_adapter, "tie", of_the_adapter, "both bad"][number % 4]
        wins += (outcome == of_the_adapter or 0.5) * (made.assignment(shown["id"]).kind == "real")
        assert rater.vote(shown, outcome).status_code == 200
    found = votes_about(made.storage, "a" * 64)
    assert (found.votes, found.raters) == (10, 1)
    assert found.win_share is not None and found.win_share.value == wins / 10 > 0.5
