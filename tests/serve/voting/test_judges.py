"""A judge of the answers that people compare: asked in both orders, held against votes, on the adapter's page."""

import json

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.cli.study_results import stored_studies
from ft_service.errors import ServingError
from ft_service.evaluate.suite import Judge
from serve.database.database import open_database
from serve.voting.judges import agreement_with, judge_study
from serve.voting.stored import stored_votes
from tests.evaluate.fake_server import FakeServer, refused
from tests.serve.voting.test_export import vote_for
from tests.serve.voting.test_stored import a_record
from tests.serve.voting.voting_world import MODELS, Rater, Voting, make_study, voting_api

JUDGE = "judge-1"
SETTINGS = Judge(url="http://fake/v1", model=JUDGE)


def prefers_good(body: dict) -> str:
    text = body["messages"][-1]["content"]
    return "A" if text.index("good answer") < text.index("bad answer") else "B"


def judge_server(answer=prefers_good) -> FakeServer:
    return FakeServer({JUDGE: answer}, digests={JUDGE: "none"})


def studied(tmp_path, **study) -> tuple[Voting, dict[str, Rater]]:
    database = f"sqlite:///{tmp_path}/service.db"
    made = make_study(open_database(database), tmp_path / "storage", **study)
    client = TestClient(voting_api(database, str(tmp_path / "storage")))
    return made, {name: Rater(client, link.partition("#")[2]) for name, link in made.links().items()}


def test_a_judge_is_asked_in_both_orders_about_real_comparisons_only(tmp_path):
    made, _ = studied(tmp_path, questions=4, controls=2, attention=1)
    server = judge_server()
    found = judge_study(made.folder, SETTINGS, server.endpoint)
    assert len(server.bodies) == 8
    assert [(one.winner, one.disagreed) for one in found.verdicts] == [(MODELS[0], False)] * 4
    assert found.unread == 0 and made.folder.judges() == [found]
    judge_study(made.folder, SETTINGS, server.endpoint)
    assert len(server.bodies) == 8  # nothing is asked again
    judge_study(made.folder, SETTINGS.model_copy(update={"rubric": "Which is shorter?"}), server.endpoint)
    assert len(server.bodies) == 16 and len(made.folder.judges()) == 2


def test_a_judge_that_takes_the_first_answer_names_neither(tmp_path):
    made, raters = studied(tmp_path, questions=3)
    found = judge_study(made.folder, SETTINGS, judge_server(lambda body: "A").endpoint)
    assert [(one.winner, one.disagreed) for one in found.verdicts] == [(None, True)] * 3
    vote_for(raters["anna"])
    agreement = agreement_with(found, made.study, stored_votes(made.folder))
    assert agreement is not None and agreement.with_people.value == 0


def test_a_judge_that_is_away_keeps_what_it_said_and_is_asked_the_rest(tmp_path):
    made, _ = studied(tmp_path, questions=4)
    server = judge_server()
    server.fault = lambda number: refused(400, "busy") if number > 3 else None
    with pytest.raises(ServingError, match=r"verdicts are missing .*busy.* asks only these again"):
        judge_study(made.folder, SETTINGS, server.endpoint, concurrency=1)
    assert made.folder.judges() == []
    before = len(server.bodies)
    server.fault = lambda number: None
    judge_study(made.folder, SETTINGS, server.endpoint, concurrency=1)
    assert len(server.bodies) - before == 5 and len(made.folder.judges()) == 1


def test_its_agreement_with_people_is_in_the_results_and_on_the_adapters_page(tmp_path, monkeypatch):
    made, raters = studied(tmp_path, questions=6)
    server = judge_server()
    monkeypatch.setattr("ft_service.evaluate.ask.Endpoint", lambda url, key: server.endpoint)
    place = ["--storage", str(tmp_path / "storage")]

    def ft(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["study", *arguments, *place], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split())

    asked = ("judge", "desk", "--url", "http://fake/v1", "--model", JUDGE)
    assert "judge-1 judged 6 comparisons in both orders" in ft(*asked)
    assert "Nobody has voted yet" in ft(*asked)
    vote_for(raters["anna"])
    vote_for(raters["bert"], "bad answer")
    line = "Judge: judge-1 decides as people do in 50 % of votes"
    assert line in ft(*asked)
    assert line in ft("results", "desk", "--database", str(made.engine.url))
    assert len(json.loads(ft(*asked, "--json"))["verdicts"]) == 6
    (study,) = stored_studies(made.storage, a_record("a" * 64))
    assert any(one.startswith(line) and "two people decide the same in 0" in one for one in study.lines)
