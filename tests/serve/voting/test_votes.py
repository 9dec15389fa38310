"""Voting over HTTP: blind, counted once, kept in two places, rebuilt from storage, closed and deleted."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, func, select, text

from ft_service.errors import UsageError
from serve.database.audit import audit_log
from serve.database.database import open_database, session
from serve.database.tables import AssignmentRow, VoteRow, with_utc
from serve.voting.links import token_of, voting_secret
from serve.voting.studies import add_rater, close_study, delete_rater, open_study, study_summary
from tests.serve.voting.voting_world import MODELS, Rater, Voting, make_study, voting_api


@pytest.fixture
def database(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/service.db"


def voting(tmp_path: Path, database: str, **study) -> tuple[Voting, TestClient]:
    made = make_study(open_database(database), tmp_path / "storage", **study)
    api = voting_api(database, str(tmp_path / "storage"), api_key="a-key")
    return made, TestClient(api, raise_server_exceptions=False)


def code(response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def votes_in(database: str) -> dict[str, str]:
    with session(open_database(database)) as opened:
        return {row.assignment: row.outcome for row in opened.scalars(select(VoteRow))}


def test_a_vote_is_in_the_database_and_on_storage_and_shows_the_next_comparison(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    reply = rater.vote(first, "right", note=" fine ", seconds=3.21).json()
    assert reply["done"] == 1 and reply["total"] == 6
    assert reply["comparison"]["id"] != first["id"]
    assert votes_in(database) == {first["id"]: "right"}
    (vote,), _, _ = made.folder.votes_of("desk-r0")
    one = made.comparison(first["id"])
    is_left = made.assignment(first["id"]).first_is_left
    assert (vote.outcome, vote.note, vote.seconds, vote.comparison_digest) == ("right", "fine", 3.2, one.digest)
    assert (vote.left, vote.right) == (MODELS if is_left else MODELS[::-1])
    assert {first["left"]["text"], first["right"]["text"]} == {one.first.text, one.second.text}
    assert first["left"]["text"] == (one.first.text if is_left else one.second.text)


def test_nothing_that_the_page_gets_before_a_vote_tells_the_models_or_the_kind(tmp_path, database):
    made, client = voting(tmp_path, database, controls=2, attention=2, repeats=0.3)
    rater = Rater(client, made.token("anna"))
    seen = set()
    state = rater.state()
    while (shown := state.json())["comparison"]:
        assert not any(model in state.text for model in (*MODELS, "a" * 64, "b" * 64))
        assert not any(kind in json.dumps(shown["comparison"]) for kind in ("control", "attention", "repeat", "real"))
        seen.add(tuple(sorted(shown["comparison"])))
        state = rater.vote(shown["comparison"], "tie")
    assert seen == {("id", "left", "question", "right", "round")}


def test_a_double_click_counts_once_and_the_first_outcome_stays(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda outcome: rater.vote(first, outcome), ["left"] * 8))
    assert {reply.status_code for reply in replies} == {200}
    assert {reply.json()["done"] for reply in replies} == {1}
    assert rater.vote(first, "right").json()["last"]["outcome"] == "left"
    assert votes_in(database) == {first["id"]: "left"}


def test_the_last_vote_can_be_withdrawn_and_given_again_and_a_late_copy_of_it_does_not_count(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    second = rater.vote(first, "left").json()["comparison"]
    rater.vote(second, "left")
    assert code(rater.withdraw(first["id"])) == (409, "not_the_last")
    back = rater.withdraw(second["id"]).json()
    assert rater.withdraw(second["id"]).json() == back
    assert back["done"] == 1
    assert (back["comparison"]["id"], back["comparison"]["round"]) == (second["id"], 1)
    assert code(rater.vote(second, "left")) == (409, "withdrawn")
    rater.vote(back["comparison"], "both bad")
    assert votes_in(database) == {first["id"]: "left", second["id"]: "both bad"}
    open_study(made.engine, made.storage, "desk")
    assert votes_in(database) == {first["id"]: "left", second["id"]: "both bad"}


def test_models_are_shown_after_the_vote_and_then_it_stays(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    rater.vote(first, "left")
    shown = rater.reveal(first["id"]).json()
    assert {shown["left"], shown["right"]} == set(MODELS) and not shown["is_void"]
    assert code(rater.withdraw(first["id"])) == (409, "already_revealed")
    assert votes_in(database) == {first["id"]: "left"}


def test_asking_for_the_models_before_the_vote_makes_it_void(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    assert rater.reveal(first["id"]).json()["is_void"]
    assert code(rater.vote(first, "left")) == (409, "void")
    state = rater.state().json()
    assert state["comparison"]["id"] != first["id"] and state["total"] == 5
    open_study(made.engine, made.storage, "desk")
    assert code(rater.vote(first, "left")) == (409, "void")


def test_a_repeat_is_void_once_its_models_are_known(tmp_path, database):
    made, client = voting(tmp_path, database, repeats=0.5, questions=8)
    rater = Rater(client, made.token("anna"))
    own = [one for one in made.study.assignments if one.rater == "desk-r0"]
    repeated = {one.comparison for one in own if one.kind == "repeat"}
    state = rater.state().json()
    while made.assignment(state["comparison"]["id"]).comparison not in repeated:
        state = rater.vote(state["comparison"]).json()
    known = state["comparison"]
    before = rater.vote(known).json()["total"]
    assert not rater.reveal(known["id"]).json()["is_void"]
    after = rater.state().json()
    assert after["total"] == before - 1
    assert len(votes_in(database)) == after["done"]


def test_a_study_may_show_the_models_only_at_the_end(tmp_path, database):
    made, client = voting(tmp_path, database, questions=2, reveal="end")
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    state = rater.vote(first).json()
    assert not state["last"]["can_reveal"]
    assert code(rater.reveal(first["id"])) == (409, "too_early")
    assert code(rater.reveal(state["comparison"]["id"])) == (409, "too_early")
    assert rater.vote(state["comparison"]).json()["last"]["can_reveal"]
    assert rater.reveal(first["id"]).status_code == 200


@pytest.mark.parametrize(
    "token", ["", "desk", "desk.desk-r0.xxxx", "desk.desk-r1.{}", "other.desk-r0.{}", "ü.é.{}", "\x00.b.c"]
)
def test_a_forged_link_opens_nothing(tmp_path, database, token):
    made, client = voting(tmp_path, database)
    signature = made.token("anna").rsplit(".", 1)[1]
    forged = token.format(signature).encode()
    headers = [(b"authorization", b"Bearer " + forged)]
    assert code(client.get("/vote/state", headers=headers)) == (401, "invalid_link")
    assert code(client.get("/vote/state")) == (401, "invalid_link")
    body = {"assignment": "0" * 16, "round": 0, "outcome": "left"}
    assert code(client.post("/vote/votes", json=body, headers=headers)) == (401, "invalid_link")


def test_a_link_opens_its_own_study_only_and_no_other_route(tmp_path, database):
    made, client = voting(tmp_path, database)
    other = make_study(made.engine, tmp_path / "storage", name="other")
    anna = Rater(client, made.token("anna"))
    foreign = Rater(client, other.token("anna")).state().json()["comparison"]
    assert code(anna.vote(foreign)) == (404, "unknown_assignment")
    assert code(anna.reveal(foreign["id"])) == (404, "unknown_assignment")
    of_bert = Rater(client, made.token("bert")).state().json()["comparison"]
    assert code(anna.vote(of_bert)) == (404, "unknown_assignment")
    headers = {"authorization": f"Bearer {made.token('anna')}"}
    assert client.get("/v1/models", headers=headers).status_code == 401


def test_tokens_are_digests_at_rest(tmp_path, database):
    made, _ = voting(tmp_path, database)
    token = made.token("anna")
    made.engine.dispose()
    content = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"desk-r0" in content
    assert token.encode() not in content and token.rsplit(".", 1)[1].encode() not in content


def test_the_secret_is_made_once_however_many_processes_need_it_first(database):
    engines = [open_database(database) for _ in range(8)]
    together = threading.Barrier(len(engines))

    def first(engine: Engine) -> bytes:
        together.wait()
        return voting_secret(engine)

    with ThreadPoolExecutor(len(engines)) as pool:
        secrets = set(pool.map(first, engines))
    assert len(secrets) == 1 and len(secrets.pop()) == 32


def test_a_link_of_another_database_is_not_valid(tmp_path, database):
    made, client = voting(tmp_path, database)
    other = open_database(f"sqlite:///{tmp_path}/other.db")
    token = token_of(voting_secret(other), "desk", "desk-r0")
    assert code(Rater(client, token).state()) == (401, "invalid_link")
    assert voting_secret(other) != voting_secret(made.engine)


def test_after_the_end_no_vote_is_taken_and_models_can_be_seen(tmp_path, database):
    made, client = voting(tmp_path, database, reveal="end")
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    second = rater.vote(first).json()["comparison"]
    close_study(made.engine, made.storage, "desk")
    close_study(made.engine, made.storage, "desk")
    assert code(rater.vote(second)) == (410, "study_closed")
    assert code(rater.withdraw(first["id"])) == (410, "study_closed")
    assert code(rater.state()) == (410, "study_closed")
    open_study(made.engine, made.storage, "desk")
    assert code(rater.vote(second)) == (410, "study_closed")
    assert rater.reveal(first["id"]).status_code == 200
    assert len(votes_in(database)) == 1


def test_deleting_a_rater_deletes_name_votes_and_notes_everywhere_and_the_link(tmp_path, database):
    made, client = voting(tmp_path, database)
    anna = Rater(client, made.token("anna"))
    bert = Rater(client, made.token("bert"))
    anna.vote(anna.state().json()["comparison"], note="my dog's name is Rex")
    bert.vote(bert.state().json()["comparison"])
    assert delete_rater(made.engine, made.storage, "desk", "anna") == 1
    assert code(anna.state()) == (410, "link_deleted")
    assert len(votes_in(database)) == 1
    with session(made.engine) as opened:
        opened.connection().exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    made.engine.dispose()
    stored = b"".join(file.read_bytes() for file in (tmp_path / "storage").rglob("*") if file.is_file())
    assert b"Rex" not in stored and b"anna" not in stored and b"bert" in stored
    kept = (tmp_path / "service.db").read_bytes()
    assert b"Rex" not in kept and b"anna" not in kept
    open_study(made.engine, made.storage, "desk")
    assert code(anna.state()) == (410, "link_deleted")
    assert len(votes_in(database)) == 1 and bert.state().status_code == 200
    assert "studies.delete_rater" in [entry.action for entry in audit_log(made.engine)]


def test_somebody_who_joins_gets_what_has_the_fewest_votes_and_survives_a_rebuild(tmp_path, database):
    made, client = voting(tmp_path, database, questions=8, repeats=0.2, attention=1, controls=1)
    anna = Rater(client, made.token("anna"))
    bert = Rater(client, made.token("bert"))
    anna.vote_all()
    for _ in range(3):
        bert.vote(bert.state().json()["comparison"])
    delete_rater(made.engine, made.storage, "desk", "bert")
    assert study_summary(made.engine, "desk").reviews == {1: 8}
    number = add_rater(made.engine, made.storage, "desk", "cleo")
    with pytest.raises(UsageError, match="a rater of this name"):
        add_rater(made.engine, made.storage, "desk", "cleo")
    cleo = Rater(client, made.token("cleo"))
    first = cleo.state().json()["comparison"]
    cleo.vote(first)
    open_study(made.engine, made.storage, "desk")
    assert cleo.state().json()["total"] == number == 8 + 2 + 1 + 1
    cleo.vote_all()
    assert study_summary(made.engine, "desk").reviews == {2: 8}
    with pytest.raises(UsageError, match="nobody else is needed"):
        add_rater(made.engine, made.storage, "desk", "dora")
    close_study(made.engine, made.storage, "desk")
    with pytest.raises(UsageError, match="is closed"):
        add_rater(made.engine, made.storage, "desk", "dora")


def test_the_tables_are_the_same_after_a_rebuild_into_a_new_database(tmp_path, database):
    made, client = voting(tmp_path, database, controls=1, attention=1, repeats=0.2, axes=("correctness",))
    for name, outcome in (("anna", "left"), ("bert", "both bad")):
        Rater(client, made.token(name)).vote_all(outcome)
    other = open_database(f"sqlite:///{tmp_path}/other.db")
    open_study(other, made.storage, "desk", action="rebuild")
    for table in (VoteRow, AssignmentRow):
        assert rows(other, table) == rows(made.engine, table)
    assert study_summary(other, "desk") == study_summary(made.engine, "desk")


def rows(engine, table) -> set[str]:
    names = table.__table__.columns.keys()
    with session(engine) as opened:
        return {str([_comparable(getattr(row, name)) for name in names]) for row in opened.scalars(select(table))}


def _comparable(value: object) -> object:
    """SQLite gives moments back without their time zone."""
    return with_utc(value) if isinstance(value, datetime) else value


def test_fifty_raters_at_once_lose_and_double_nothing(tmp_path, database):
    names = [f"rater {number}" for number in range(50)]
    made, client = voting(tmp_path, database, questions=10, raters=names, votes_per_item=20, repeats=0.2)
    links = made.links()
    start = threading.Barrier(len(names))

    def vote(name: str) -> list[str]:
        start.wait()
        return Rater(client, links[name].partition("#")[2]).vote_all()

    with ThreadPoolExecutor(len(names)) as pool:
        done = [one for votes in pool.map(vote, names) for one in votes]
    assert sorted(done) == sorted(one.id for one in made.study.assignments)
    assert set(votes_in(database)) == set(done)
    on_storage = [vote.assignment for rater in made.study.raters for vote in made.folder.votes_of(rater)[0]]
    assert sorted(on_storage) == sorted(done)
    assert study_summary(made.engine, "desk").reviews == {20: 10}


def test_a_storage_that_is_away_is_a_503_and_no_vote(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    votes = tmp_path / "storage" / "studies" / "desk" / "votes"
    votes.write_text("in the way")
    response = rater.vote(first)
    assert code(response) == (503, "votes_unavailable") and str(tmp_path) not in response.text
    assert votes_in(database) == {}
    votes.unlink()
    assert rater.vote(first).json()["done"] == 1


def test_a_database_that_is_away_is_a_503_and_no_vote(tmp_path, database):
    made, client = voting(tmp_path, database)
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    with made.engine.begin() as connection:
        connection.execute(text("ALTER TABLE study_votes RENAME TO away"))
    response = rater.vote(first)
    assert code(response) == (503, "votes_unavailable") and "sqlite" not in response.text
    assert not (tmp_path / "storage/studies/desk/votes").exists()
    with made.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO study_votes"))
    assert rater.vote(first).json()["done"] == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"outcome": "up"},
        {"round": -1},
        {"assignment": "x"},
        {"assignment": "\x00" * 16},
        {"scores": {"beauty": 1}},
        {"scores": {"correctness": 3}},
        {"note": "x" * 2001},
        {"extra": 1},
    ],
)
def test_a_vote_that_is_none_is_refused_and_not_kept(tmp_path, database, body):
    made, client = voting(tmp_path, database, axes=("correctness",))
    rater = Rater(client, made.token("anna"))
    first = rater.state().json()["comparison"]
    given = {"assignment": first["id"], "round": 0, "outcome": "left", **body} if body else {}
    headers = {"authorization": f"Bearer {made.token('anna')}"}
    assert client.post("/vote/votes", json=given, headers=headers).status_code == 400
    assert votes_in(database) == {}
    assert rater.vote(first, scores={"correctness": -2}).status_code == 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(data=st.data())
def test_no_body_is_answered_by_a_5xx(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    database = f"sqlite:///{folder}/service.db"
    if not folder.exists():
        make_study(open_database(database), folder / "storage", axes=("tone",), questions=200)
        CLIENTS["fuzz"] = TestClient(voting_api(database, str(folder / "storage")), raise_server_exceptions=False)
    token = token_of(voting_secret(open_database(database)), "desk", "desk-r0")
    rater = Rater(CLIENTS["fuzz"], token)
    comparison = rater.state().json()["comparison"]
    fields = ("assignment", "round", "outcome", "scores", "note", "seconds")
    body = {"assignment": comparison["id"], "round": 0, "outcome": "left"}
    body |= data.draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=2))
    path = data.draw(st.sampled_from(["votes", "withdrawals", "reveals"]))
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    content = data.draw(st.just(json.dumps(body).encode()) | st.binary(max_size=30))
    response = CLIENTS["fuzz"].post(f"/vote/{path}", content=content, headers=headers)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


CLIENTS: dict[str, TestClient] = {}


def test_the_page_needs_no_key_and_holds_no_data(tmp_path, database):
    _, client = voting(tmp_path, database)
    page = client.get("/vote")
    assert page.status_code == 200 and "Help desk" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_assignments_are_spread_swapped_and_hidden(tmp_path, database):
    raters = [f"r{number}" for number in range(5)]
    made, _ = voting(
        tmp_path, database, questions=40, raters=raters, votes_per_item=3, repeats=0.1, controls=10, attention=2
    )
    of_rater = {rater: [one for one in made.study.assignments if one.rater == rater] for rater in made.study.raters}
    reviews = Counter(one.comparison for one in made.study.assignments if one.kind == "real")
    assert set(reviews.values()) == {3}
    for own in of_rater.values():
        kinds = Counter(one.kind for one in own)
        assert kinds == {"real": 24, "repeat": 2, "control": 5, "attention": 2}
        assert abs(sum(one.first_is_left for one in own if one.kind == "real") - 12) <= 1
        assert [one.position for one in own] == list(range(len(own)))
        for repeat in (one for one in own if one.kind == "repeat"):
            (first,) = [one for one in own if one.kind == "real" and one.comparison == repeat.comparison]
            assert repeat.first_is_left is not first.first_is_left
            assert repeat.position - first.position >= 10
    with session(made.engine) as opened:
        assert opened.scalar(select(func.count()).select_from(AssignmentRow)) == len(made.study.assignments)
