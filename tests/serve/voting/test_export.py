"""Votes become rows, preference pairs and results; commands print them."""

import csv
import io
import json

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import DataError
from serve.database.database import open_database
from serve.voting.export import as_csv, as_jsonl, as_preferences, vote_records
from serve.voting.results import axis_lines, rater_lines, result_lines, study_result
from tests.serve.voting.voting_world import MODELS, Rater, Voting, make_study, voting_api

GOOD, BAD = MODELS


@pytest.fixture
def database(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/service.db"


def open_raters(tmp_path, database, **study) -> tuple[Voting, dict[str, Rater]]:
    made = make_study(open_database(database), tmp_path / "storage", **study)
    client = TestClient(voting_api(database, str(tmp_path / "storage")))
    return made, {name: Rater(client, link.partition("#")[2]) for name, link in made.links().items()}


def vote_for(rater: Rater, wanted: str = "good answer", **more) -> None:
    """Prefer the answer that begins so; where neither does, as in an attention item, the one that is 4."""
    while comparison := rater.state().json()["comparison"]:
        left, right = comparison["left"]["text"], comparison["right"]["text"]
        left_is_it = left.startswith(wanted) or left == "4"
        right_is_it = right.startswith(wanted) or right == "4"
        outcome = "tie" if left_is_it == right_is_it else "left" if left_is_it else "right"
        assert rater.vote(comparison, outcome, **more).status_code == 200


def test_every_vote_is_a_line_with_all_that_it_was_about(tmp_path, database):
    made, raters = open_raters(tmp_path, database, questions=2, axes=("correctness",), attention=1)
    vote_for(raters["anna"], note="=SUM(A1)", scores={"correctness": 1})
    lines = [json.loads(line) for line in as_jsonl(vote_records(made.engine, "desk")).splitlines()]
    assert len(lines) == 3 and {line["rater"] for line in lines} == {"anna"}
    (attention,) = [line for line in lines if line["kind"] == "attention"]
    assert attention["expected"] == attention["outcome"] and attention["left_model"] is None
    for line in (line for line in lines if line["kind"] == "real"):
        assert line["winner"] == GOOD
        side = line["outcome"]
        assert line[f"{side}_answer"].startswith("good") and line[f"{side}_digest"] == "a" * 64
        assert line["scores"] == {"correctness": 1} and line["turns"][0]["content"].startswith("Question")


def test_a_cell_that_a_spreadsheet_would_run_is_text(tmp_path, database):
    made, raters = open_raters(
        tmp_path, database, texts=[("-1?", "=good", "@bad")], axes=("correctness", "tone"), raters=("+anna", "bert")
    )
    rater = raters["+anna"]
    rater.vote(rater.state().json()["comparison"], note='=HYPERLINK("x")', scores={"tone": -2})
    (row,) = csv.DictReader(io.StringIO(as_csv(vote_records(made.engine, "desk"), ["correctness", "tone"])))
    assert (row["note"], row["turns"], row["rater"]) == ('\'=HYPERLINK("x")', "'-1?", "'+anna")
    assert {row["left_answer"], row["right_answer"]} == {"'=good", "'@bad"}
    assert (row["score_correctness"], row["score_tone"]) == ("", "-2")


def test_preference_pairs_are_what_most_raters_prefer(tmp_path, database):
    names = ("anna", "bert", "cleo")
    made, raters = open_raters(
        tmp_path, database, questions=3, raters=names, votes_per_item=3, controls=1, attention=1, repeats=0.3
    )
    vote_for(raters["anna"])
    vote_for(raters["bert"])
    vote_for(raters["cleo"], "bad answer")
    pairs = [json.loads(line) for line in as_preferences(vote_records(made.engine, "desk")).splitlines()]
    assert sorted(pairs, key=lambda pair: pair["prompt"]) == [
        {"prompt": f"Question {n}?", "chosen": f"good answer {n}", "rejected": f"bad answer {n}"} for n in range(3)
    ]


def test_an_even_split_or_two_bad_answers_are_no_preference(tmp_path, database):
    made, raters = open_raters(tmp_path, database, questions=2)
    vote_for(raters["anna"])
    raters["bert"].vote_all("both bad")
    assert as_preferences(vote_records(made.engine, "desk")) == ""


def test_results_say_who_wins_and_who_clicks_at_random(tmp_path, database):
    names = [f"r{number}" for number in range(6)]
    made, raters = open_raters(
        tmp_path, database, questions=30, raters=names, votes_per_item=5, repeats=0.1, controls=4, attention=2
    )
    for name in names[:5]:
        vote_for(raters[name])
    raters["r5"].vote_all("left")
    result = study_result(vote_records(made.engine, "desk"), MODELS)
    (pair,) = result.everyone.pairs
    assert (pair.first, pair.second) == MODELS and pair.share.value > 0.8
    assert pair.votes == 150
    assert result.looks_random == ("r5",) and result.without_random
    assert [one.verdict for one in result.without_random.pairs] == ["better"]
    text = "\n".join([*result_lines(result), *rater_lines(result)])
    assert f"{GOOD} wins" in text
    assert "1 of 6 raters looks random (r5)" in text and "Prefers the left side" in text


def test_scores_are_counted_for_the_model_and_not_the_side(tmp_path, database):
    made, raters = open_raters(tmp_path, database, questions=6, axes=("tone",))
    rater = raters["anna"]
    while comparison := rater.state().json()["comparison"]:
        rater.vote(comparison, scores={"tone": -1 if comparison["left"]["text"].startswith("good") else 1})
    assert axis_lines(vote_records(made.engine, "desk"), MODELS) == [
        f"tone: {GOOD} better 6 times, the same 0 times, {BAD} better 0 times."
    ]


def test_results_without_votes_are_an_error_that_says_so(tmp_path, database):
    made, _ = open_raters(tmp_path, database)
    with pytest.raises(DataError, match="Collect votes first"):
        study_result(vote_records(made.engine, "desk"), MODELS)


def test_the_commands(tmp_path, database):
    _, raters = open_raters(tmp_path, database)
    for name in ("anna", "bert"):
        vote_for(raters[name])
    environment = {"FT_DATABASE_URL": database, "FT_STORAGE": str(tmp_path / "storage"), "COLUMNS": "200"}

    def ft(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["study", *arguments], env=environment, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "12 of 12" in ft("list") and json.loads(ft("list", "--json"))[0]["name"] == "desk"
    assert "6 comparisons with 2 votes" in ft("show", "desk")
    assert ft("links", "desk", "--server", "https://ft.example").count("https://ft.example/vote#desk.") == 2
    assert f"{GOOD} wins 100.0 %" in ft("results", "desk")
    assert json.loads(ft("results", "desk", "--json"))["everyone"]["pairs"][0]["wins"] == 12
    assert ft("export", "desk", "--to", "csv").splitlines()[0].startswith("study,study_digest,rater,kind")
    assert "6 pairs" in ft("export", "desk", str(tmp_path / "dpo.jsonl"), "--to", "preferences")
    assert len((tmp_path / "dpo.jsonl").read_text().splitlines()) == 6
    assert "12 votes from storage" in ft("rebuild", "desk")
    assert "6 votes" in ft("delete-rater", "desk", "anna", "--yes")
    joined = ft("add-rater", "desk", "dora", "--server", "https://ft.example")
    assert "dora gets 6 comparisons" in joined and "https://ft.example/vote#desk." in joined
    assert "closed" in ft("close", "desk")
    shown = json.loads(ft("show", "desk", "--json"))
    assert [rater["name"] for rater in shown["raters"]] == [None, "bert", "dora"]
    assert shown["done"] == 6
