"""The votes on storage alone are those of the database, and an adapter's page shows what they say."""

import dataclasses

import pytest
from fastapi.testclient import TestClient

from ft_service.cli.study_results import stored_studies
from ft_service.registry.registry import AdapterRecord
from serve.database.database import open_database
from serve.voting.evidence import votes_about
from serve.voting.export import vote_records
from serve.voting.results import result_lines, study_result
from serve.voting.stored import stored_votes
from serve.voting.studies import delete_rater
from tests.registry.test_registry import DRAFT
from tests.serve.voting.test_export import vote_for
from tests.serve.voting.voting_world import MODELS, Rater, Voting, make_study, voting_api


@pytest.fixture
def made(tmp_path) -> Voting:
    database = f"sqlite:///{tmp_path}/service.db"
    made = make_study(open_database(database), tmp_path / "storage", questions=4, attention=1)
    client = TestClient(voting_api(database, str(tmp_path / "storage")))
    for number, (_, link) in enumerate(made.links().items()):
        rater = Rater(client, link.partition("#")[2])
        if number == 0:
            first = rater.state().json()["comparison"]
            assert rater.vote(first, "tie").status_code == 200
            assert rater.withdraw(first["id"]).status_code == 200
        vote_for(rater)
    return made


def a_record(digest: str) -> AdapterRecord:
    values = {**DRAFT, "id": MODELS[0], "digest": digest, "created": "2026-07-03T09:00:00Z", "files": {}}
    return AdapterRecord.model_validate(values)


def comparable(records) -> list[dict]:
    rows = [{**dataclasses.asdict(record), "rater": None} for record in records]
    return sorted(rows, key=lambda row: (row["comparison"], row["kind"], row["time"]))


def test_files_and_database_hold_the_same_votes(made):
    in_database = vote_records(made.engine, "desk")
    assert len(in_database) > 8
    assert comparable(stored_votes(made.folder)) == comparable(in_database)
    delete_rater(made.engine, made.storage, "desk", in_database[0].rater)
    left = vote_records(made.engine, "desk")
    assert 0 < len(left) < len(in_database)
    assert comparable(stored_votes(made.folder)) == comparable(left)


def test_a_study_is_shown_for_exactly_its_weights(made):
    (study,) = stored_studies(made.storage, a_record("a" * 64))
    votes = vote_records(made.engine, "desk")
    real = [vote for vote in votes if vote.kind == "real"]
    assert 0 < len(real) < len(votes)
    assert (study.name, study.votes, study.is_closed) == ("desk", len(real), False)
    assert votes_about(made.storage, "a" * 64).votes == len(real)
    assert study.lines == result_lines(study_result(votes, MODELS))
    assert stored_studies(made.storage, a_record("b" * 64)) == []


def test_a_vote_on_nothing_of_the_study_is_left_out_and_the_others_count(made):
    before = stored_votes(made.folder)
    some = made.folder.votes_of(made.study.raters[0])[0][0]
    made.folder.write_vote(some.model_copy(update={"assignment": "f" * 16}))
    assert comparable(stored_votes(made.folder)) == comparable(before)
