"""Promotion: what the suite asks for, refused with every reason, waived only by name and with a reason."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.errors import FtError, NotPublishedError, PromotionError, UsageError
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.promotion import PeoplesVotes, promote
from ft_service.evaluate.run import Request, evaluate
from ft_service.evaluate.statistics.intervals import clustered_share
from ft_service.registry.promotions import Promotions, alias_of
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from tests.evaluate.fake_server import BASE, FakeServer
from tests.evaluate.test_run import solves
from tests.registry.test_registry import DRAFT


class Desk:
    """A published adapter, and a server that answers with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(str(folder / "storage"))
        self.registry = Registry(self.storage)
        work = folder / "work"
        work.mkdir()
        (work / "adapter_config.json").write_text('{"r": 4}')
        self.adapter: AdapterRecord = self.registry.publish(work, {**DRAFT, "run_name": "bot"}, "tiny", "# {id}\n")

    def evaluate(self, share: float, num_items: int = 60, digest: str | None = None, **settings: Any) -> Evaluation:
        items = [
            {
                "id": f"i{number}",
                "skill": "sums",
                "prompt": f"What is {number} plus {number}?",
                "metric": "number",
                "reference": str(2 * number),
            }
            for number in range(num_items)
        ]
        (self.folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        suite = self.folder / "suite.yaml"
        suite.write_text(yaml.safe_dump({"name": "desk", "items": ["items.jsonl"], **settings}))
        server = FakeServer(
            {BASE: solves(0.9, 1), self.adapter.id: solves(share, 1)},
            digests={BASE: "none", self.adapter.id: digest or self.adapter.digest},
        )
        return evaluate(Request(self.adapter.id, str(suite), self.storage.root), server.endpoint)

    def holder(self) -> str | None:
        promotion = Promotions(self.registry).find(alias_of(self.adapter))
        return promotion.adapter_id if promotion else None


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


ENOUGH = {"min_items": 50, "max_forgetting": 0.1}


def refusal(kind: type[FtError], desk: Desk, **options: Any) -> str:
    with pytest.raises(kind) as error:
        promote(desk.storage, desk.adapter.id, **options)
    assert desk.holder() is None
    return str(error.value)


def test_an_adapter_that_passes_gets_its_alias_and_the_checks_are_kept(desk):
    evaluation = desk.evaluate(0.9, thresholds=ENOUGH)
    promotion = promote(desk.storage, desk.adapter.id)
    assert desk.holder() == desk.adapter.id
    assert promotion.evaluation == evaluation.id
    assert [(check.name, check.passed) for check in promotion.checks] == [
        ("evaluated", True),
        ("complete", True),
        ("evidence", True),
        ("forgetting", True),
    ]


def test_without_an_evaluation_the_cure_is_named(desk):
    text = refusal(PromotionError, desk)
    assert f"evaluated: no evaluation of these weights. Run: ft evaluate {desk.adapter.id} --suite general-en" in text


def test_an_evaluation_of_other_weights_does_not_count(desk):
    desk.evaluate(0.9, digest="f" * 64, thresholds=ENOUGH)
    assert "no evaluation of these weights" in refusal(PromotionError, desk)


def test_every_failed_check_is_a_reason(desk):
    desk.evaluate(0.3, num_items=40, thresholds={"min_items": 50, "min_stability": 0.9, "min_votes": 30})
    text = refusal(PromotionError, desk)
    assert "4 checks failed" in text
    for expected in (
        "evidence: 40 questions answered by both models; the suite asks for 50",
        "forgetting: It forgot:",
        "stability: not measured; the suite asks for 90%",
        "votes: 0 votes of people; the suite asks for 30",
        "--waive evidence=REASON",
    ):
        assert expected in text


def test_what_is_not_settled_does_not_pass(desk):
    """A few points lost on few items: the limit lies within the interval."""
    evaluation = desk.evaluate(0.85, thresholds={"min_items": 10, "max_forgetting": 0.08})
    assert evaluation.forgetting.verdict == "not settled"
    assert "forgetting: Not settled whether it forgot" in refusal(PromotionError, desk)


def test_stability_and_votes_that_suffice_pass(desk):
    desk.evaluate(0.9, thresholds={**ENOUGH, "min_stability": 0.9, "min_votes": 30}, stability={"limit": 5})
    assert "votes: 29 votes" in refusal(PromotionError, desk, people=PeoplesVotes(29))
    promotion = promote(desk.storage, desk.adapter.id, people=PeoplesVotes(30))
    assert {check.name for check in promotion.checks if check.passed} >= {"stability", "votes"}


def test_a_win_share_counts_with_its_interval_and_from_three_people(desk):
    desk.evaluate(0.9, thresholds={**ENOUGH, "min_win_share": 0.5})
    assert "win share: no votes of people; the suite asks for 50%" in refusal(PromotionError, desk)

    def people(wins: int, losses: int, raters: int) -> PeoplesVotes:
        scores = [1.0] * wins + [0.0] * losses
        share = clustered_share(scores, [number % raters for number in range(len(scores))])
        return PeoplesVotes(len(scores), share, raters)

    assert "wins 55% of 40 votes of 20 raters (" in refusal(PromotionError, desk, people=people(22, 18, 20))
    assert "of 2 raters" in refusal(PromotionError, desk, people=people(100, 0, 2))
    promotion = promote(desk.storage, desk.adapter.id, people=people(36, 4, 20))
    assert [check.detail.partition(" (")[0] for check in promotion.checks if check.name == "win share"] == [
        "wins 90% of 40 votes of 20 raters"
    ]


def test_a_failed_check_is_waived_by_name_with_its_reason(desk):
    desk.evaluate(0.3, thresholds=ENOUGH)
    promotion = promote(desk.storage, desk.adapter.id, waived={"forgetting": "Only sums are asked."})
    assert desk.holder() == desk.adapter.id
    waived = [check for check in promotion.checks if not check.passed]
    assert [(check.name, check.waived) for check in waived] == [("forgetting", "Only sums are asked.")]


@pytest.mark.parametrize(
    ("waived", "expected"),
    [
        ({"luck": "x"}, "is no check. Checks: evaluated"),
        ({"forgetting": " "}, "has no reason"),
        ({"complete": "x"}, "that check did not fail"),
    ],
)
def test_waivers_that_waive_nothing_are_refused(desk, waived, expected):
    desk.evaluate(0.9, thresholds=ENOUGH)
    assert expected in refusal(UsageError, desk, waived=waived)


def test_one_suite_decides(desk):
    desk.evaluate(0.9, thresholds=ENOUGH)
    desk.evaluate(0.9, thresholds=ENOUGH, name="other")
    assert "was evaluated by desk, other" in refusal(UsageError, desk)
    assert "was not evaluated by it. Evaluated by: desk, other" in refusal(UsageError, desk, suite="third")
    promote(desk.storage, desk.adapter.id, suite="other")
    assert desk.holder() == desk.adapter.id


def test_the_error_survives_pickling():
    error = PromotionError("a", ["evidence: too little"], "evidence")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_commands_promote_and_demote(desk):
    desk.evaluate(0.9, thresholds=ENOUGH)

    def ft(*arguments: str) -> str:
        given = ["adapters", *arguments, "--storage", desk.storage.root]
        done = CliRunner().invoke(app, given, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    alias = alias_of(desk.adapter)
    assert f"{alias} answers with {desk.adapter.id}" in ft("promote", desk.adapter.id)
    assert json.loads(ft("promote", desk.adapter.id, "--json"))["adapter_id"] == desk.adapter.id
    assert f"{alias} is gone" in ft("demote", alias)
    assert desk.holder() is None
    with pytest.raises(NotPublishedError, match="does not exist"):
        ft("demote", alias)
    with pytest.raises(UsageError, match="has no reason"):
        ft("promote", desk.adapter.id, "--waive", "forgetting")


def test_the_command_counts_the_votes_of_all_studies(desk, monkeypatch):
    desk.evaluate(0.9, thresholds={**ENOUGH, "min_votes": 30})
    asked = []

    def votes(storage: Storage, digest: str) -> PeoplesVotes:
        asked.append(digest)
        return PeoplesVotes(31)

    monkeypatch.setattr("serve.voting.evidence.votes_about", votes)
    given = ["adapters", "promote", desk.adapter.id, "--storage", desk.storage.root]
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert asked == [desk.adapter.digest]
    assert "31 votes of people; the suite asks for 30" in done.stdout
