"""A whole evaluation against a server in this process: comparison, forgetting, stability, judge, faults, resuming."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ft_service.errors import DataError, ServingError, UsageError
from ft_service.evaluate.evaluation import Evaluation, find_evaluation, read_results
from ft_service.evaluate.run import Request, evaluate
from ft_service.evaluate.scorecard import read_scorecard
from ft_service.storage.storage import Storage
from tests.evaluate.fake_server import ADAPTER, BASE, FakeServer, question_in, refused

SKILLS = ("arithmetic", "reading", "code")


def proportion_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's by its formula, at 95 %."""
    z = 1.959964
    share = successes / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return middle - half, middle + half


class World:
    """A suite of made-up items, and a storage root."""

    def __init__(self, folder: Path, num_items: int, **settings: object) -> None:
        self.folder = folder
        self.storage = Storage(str(folder / "storage"))
        items = [
            {
                "id": f"item-{number:03}",
                "skill": SKILLS[number % len(SKILLS)],
                "prompt": f"What is {number} plus {number}?",
                "metric": "number",
                "reference": str(2 * number),
            }
            for number in range(num_items)
        ]
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        self.suite = folder / "suite.yaml"
        self.suite.write_text(yaml.safe_dump({"name": "sums", "items": ["items.jsonl"], **settings}))

    def evaluate(self, server: FakeServer, **options: Any) -> Evaluation:
        request = Request(ADAPTER, str(self.suite), self.storage.root, **options)
        return evaluate(request, server.endpoint)


def solves(share: float, seed: int, skills: tuple[str, ...] = SKILLS) -> Callable[[dict[str, Any]], str]:
    """Right for a share of the items, the same ones every time; wrong for every item of other skills."""

    def answer(body: dict[str, Any]) -> str:
        number = int(question_in(body).split()[2])
        is_right = random.Random(f"{seed}-{number}").random() < share and SKILLS[number % len(SKILLS)] in skills
        return f"It is {2 * number if is_right else 2 * number + 1}."

    return answer


def test_an_adapter_that_is_better_is_called_better_with_its_interval(tmp_path):
    world = World(tmp_path, 120)
    evaluation = world.evaluate(FakeServer({BASE: solves(0.4, 1), ADAPTER: solves(0.9, 2)}))
    overall = evaluation.comparison.overall
    assert overall is not None
    assert overall.verdict == "better"
    assert 0 < overall.low < overall.difference < overall.high
    assert overall.items == evaluation.items == 120
    assert {skill.name for skill in evaluation.comparison.skills} == set(SKILLS)
    results = read_results(world.storage, evaluation.id)
    assert overall.difference == pytest.approx(sum(result.change for result in results) / 120)
    wilson = proportion_interval(sum(result.adapter.value == 1 for result in results), 120)
    assert overall.adapter_interval == pytest.approx(wilson)
    assert overall.won == sum(result.change > 0 for result in results)
    assert evaluation.is_complete and evaluation.num_failures == 0


def test_an_adapter_equal_to_its_base_is_never_better(tmp_path):
    same = solves(0.5, 1)
    evaluation = World(tmp_path, 60).evaluate(FakeServer({BASE: same, ADAPTER: same}))
    overall = evaluation.comparison.overall
    assert overall is not None and overall.verdict == "not settled" and overall.difference == 0
    assert all(skill.verdict == "not settled" for skill in evaluation.comparison.skills)
    assert evaluation.forgetting.verdict == "within the limit"


def test_a_planted_loss_of_a_skill_is_found_and_shown(tmp_path):
    evaluation = World(tmp_path, 150).evaluate(
        FakeServer({BASE: solves(0.9, 1), ADAPTER: solves(0.9, 1, skills=("arithmetic", "reading"))})
    )
    forgetting = evaluation.forgetting
    assert forgetting.verdict == "forgot"
    assert {skill.name: skill.verdict for skill in forgetting.skills} == {
        "arithmetic": "not settled",
        "reading": "not settled",
        "code": "worse",
    }
    assert "Worse at: code" in forgetting.sentence
    assert forgetting.num_lost == sum(skill.lost for skill in forgetting.skills) > 30
    lost = forgetting.lost[0]
    assert lost.skill == "code" and lost.base_value == 1 and lost.adapter_value == 0
    assert lost.base_answer != lost.adapter_answer


def test_forgetting_is_measured_on_the_general_items_only(tmp_path):
    (tmp_path / "general.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "id": f"general-{number}",
                    "skill": "general",
                    "prompt": f"What is {number} plus {number}?",
                    "metric": "number",
                    "reference": str(2 * number),
                }
            )
            + "\n"
            for number in range(200, 230)
        )
    )
    world = World(tmp_path, 30, general=["general.jsonl"])
    evaluation = world.evaluate(FakeServer({BASE: solves(1, 1), ADAPTER: solves(0.5, 1)}))
    assert evaluation.comparison.overall is not None and evaluation.comparison.overall.items == 30
    assert evaluation.items == 60
    forgetting = evaluation.forgetting
    assert forgetting.overall is not None and forgetting.overall.items == 30
    assert {lost.skill for lost in forgetting.lost} == {"general"}


def test_perplexity_of_general_text_is_that_of_its_tokens(tmp_path):
    server = FakeServer({BASE: solves(1, 1), ADAPTER: solves(1, 1)}, token_logprob={BASE: -1.0, ADAPTER: -2.0})
    texts = World(tmp_path, 12).evaluate(server).forgetting.texts
    assert texts is not None
    assert (texts.base, texts.adapter) == (1.0, 2.0)
    assert texts.tokens == 12 * 4  # of five words the first one has no probability
    assert texts.per_text.verdict == "worse"


def test_the_same_call_returns_what_is_complete_without_asking(tmp_path):
    world = World(tmp_path, 20)
    answers = {BASE: solves(0.5, 1), ADAPTER: solves(0.5, 2)}
    first = world.evaluate(FakeServer(answers))
    again = FakeServer(answers)
    assert world.evaluate(again) == first
    assert again.bodies == []


def test_a_server_that_fails_half_way_leaves_a_report_and_the_same_call_goes_on(tmp_path):
    world = World(tmp_path, 30)
    answers = {BASE: solves(0.5, 1), ADAPTER: solves(0.5, 2)}
    broken = FakeServer(answers, fault=lambda number: refused(401, "revoked") if number > 40 else None)
    partial = world.evaluate(broken)
    assert not partial.is_complete
    assert partial.stopped == "status 401: revoked"
    assert partial.num_failures == 120 - 40
    assert 15 <= partial.items <= 20  # of both models
    overall = partial.comparison.overall
    assert overall is not None and overall.items == partial.items
    assert find_evaluation(world.storage, partial.id) == partial
    healthy = FakeServer(answers)
    complete = world.evaluate(healthy)
    assert complete.id == partial.id
    assert complete.is_complete and complete.items == 30
    assert len(healthy.bodies) == 80


def test_a_server_that_never_answers_writes_no_result(tmp_path):
    world = World(tmp_path, 10)
    server = FakeServer(
        {BASE: solves(1, 1), ADAPTER: solves(1, 1)}, fault=lambda number: refused(400, "no chat template")
    )
    with pytest.raises(ServingError, match=r"no item was answered by both models .*no chat template"):
        world.evaluate(server, evaluation_id="mine")
    assert find_evaluation(world.storage, "mine") is None


def test_weights_that_change_in_between_stop_the_evaluation(tmp_path):
    server = FakeServer({BASE: solves(1, 1), ADAPTER: solves(1, 1)})

    def change(number: int) -> None:
        if number == 50:
            server.digests[ADAPTER] = "d" * 64

    server.fault = change
    with pytest.raises(ServingError, match="other weights answer than before"):
        World(tmp_path, 40).evaluate(server)


def test_an_id_is_not_continued_with_another_suite_or_other_weights(tmp_path):
    world = World(tmp_path, 10)
    answers = {BASE: solves(1, 1), ADAPTER: solves(1, 1)}
    world.evaluate(FakeServer(answers), evaluation_id="mine")
    other = FakeServer(answers, digests={BASE: "none", ADAPTER: "e" * 64})
    with pytest.raises(UsageError, match="started with another state of the adapter"):
        world.evaluate(other, evaluation_id="mine")
    assert world.evaluate(other).id != world.evaluate(FakeServer(answers)).id
    world = World(tmp_path, 11)
    with pytest.raises(UsageError, match="another state of the suite"):
        world.evaluate(FakeServer(answers), evaluation_id="mine")


def test_unknown_models_and_models_without_a_base_are_refused(tmp_path):
    world = World(tmp_path, 5)
    server = FakeServer({BASE: solves(1, 1)})
    with pytest.raises(ServingError, match=f"has no such model. It has: {BASE}"):
        world.evaluate(server)
    request = Request(BASE, str(world.suite), world.storage.root)
    with pytest.raises(UsageError, match="--against"):
        evaluate(request, server.endpoint)
    with pytest.raises(UsageError, match="is the evaluated model itself"):
        evaluate(Request(BASE, str(world.suite), world.storage.root, against=BASE), server.endpoint)
    with pytest.raises(UsageError, match="--id"):
        world.evaluate(FakeServer({BASE: solves(1, 1), ADAPTER: solves(1, 1)}), evaluation_id="../x")


def test_answers_that_were_cut_are_counted(tmp_path):
    server = FakeServer({BASE: solves(1, 1), ADAPTER: solves(1, 1)}, finish_reason="length")
    evaluation = World(tmp_path, 12).evaluate(server)
    assert (evaluation.cut_base, evaluation.cut_adapter) == (12, 12)
    assert evaluation.cut_items == [f"item-{number:03}" for number in range(12)]
    assert sum(skill.cut_adapter for skill in evaluation.comparison.skills) == 12


def test_a_quick_look_asks_some_items_of_each_skill(tmp_path):
    world = World(tmp_path, 60)
    answers = {BASE: solves(0.5, 1), ADAPTER: solves(0.5, 2)}
    evaluation = world.evaluate(FakeServer(answers), limit=5)
    assert [skill.items for skill in evaluation.comparison.skills] == [5, 5, 5]
    assert evaluation.id != world.evaluate(FakeServer(answers)).id


# -- held-out data -----------------------------------------------------------------------------------------------------


def test_held_out_records_are_asked_once_and_scored_by_each_metric(tmp_path):
    lines = [{"question": f"Name number {number}", "answer": f"answer {number}"} for number in range(8)]
    lines += [{"question": "no answer"}, {"question": "", "answer": "x"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {
        "path": "held.jsonl",
        "columns": {"instruction": "question", "output": "answer"},
        "metrics": ["exact", "f1"],
    }
    world = World(tmp_path, 3, held_out=[source])

    def adapter(body: dict[str, Any]) -> str:
        question = question_in(body)
        return f"answer {question.split()[-1]}" if question.startswith("Name") else solves(1, 1)(body)

    def base(body: dict[str, Any]) -> str:
        return "answer 0" if question_in(body).startswith("Name") else solves(1, 1)(body)

    server = FakeServer({BASE: base, ADAPTER: adapter})
    evaluation = world.evaluate(server)
    assert sum("Name" in question_in(body) for body in server.bodies) == 2 * 8
    by_name = {skill.name: skill for skill in evaluation.comparison.skills}
    assert (by_name["held_out"].base, by_name["held_out"].adapter) == (1 / 8, 1)
    assert by_name["held_out_f1"].base == pytest.approx((1 + 7 * 0.5) / 8)
    assert evaluation.comparison.overall is not None and evaluation.comparison.overall.items == 3 + 8
    assert any("2 records cannot be used" in text for text in evaluation.left_out)
    assert any("the server does not tokenize" in text for text in evaluation.left_out)
    assert evaluation.one_sidedness.data is not None and evaluation.one_sidedness.data.answers == 8


def test_earlier_turns_of_a_held_out_conversation_are_asked_with_it(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Name it"},
        {"role": "assistant", "content": "It"},
    ]
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    world = World(tmp_path, 0, held_out=[{"path": "held.jsonl", "format": "chat", "metrics": ["exact"]}], judge=JUDGE)
    server = FakeServer(
        {BASE: lambda body: "It", ADAPTER: lambda body: "Them", "judge": lambda body: "A"},
        digests={BASE: "none", ADAPTER: "a" * 64, "judge": "none"},
    )
    evaluation = world.evaluate(server)
    assert server.bodies[0]["messages"] == turns[:-1]
    judged = [question_in(body) for body in server.bodies if body["model"] == "judge"]
    shown = "<question>\nsystem: Be brief.\n\nuser: Hello\n\nassistant: Hi\n\nuser: Name it\n</question>"
    assert len(judged) == 2 and all(shown in text for text in judged)
    assert evaluation.comparison.overall is not None and evaluation.comparison.overall.difference == -1


def test_references_that_a_metric_cannot_score_are_left_out_by_name(tmp_path):
    lines = [{"instruction": "How many?", "output": answer} for answer in ("five", "7 of them", "8")]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    world = World(tmp_path, 0, held_out=[{"path": "held.jsonl", "metrics": ["number"]}])
    server = FakeServer({BASE: lambda body: "7", ADAPTER: lambda body: "8"})
    evaluation = world.evaluate(server)
    assert [skill.items for skill in evaluation.comparison.skills] == [2]
    assert any("1 record cannot be scored" in text and "'five' has no number" in text for text in evaluation.left_out)
    (tmp_path / "held.jsonl").write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(DataError, match=r"no record can be scored .*'five' has no number"):
        world.evaluate(server)


# -- stability and judge -----------------------------------------------------------------------------------------------


def test_a_stable_model_repeats_itself(tmp_path):
    world = World(tmp_path, 12, stability={"limit": 10, "repeats": 2, "seeds": 3})
    server = FakeServer({BASE: solves(0.5, 1), ADAPTER: solves(0.5, 2)})
    stability = world.evaluate(server).stability
    assert stability is not None
    for figures in (stability.base, stability.adapter):
        assert (figures.items, figures.equal_at_zero, figures.equal_with_seed) == (10, 1, 1)
        assert figures.self_agreement == 1
        assert figures.flips_over_paraphrases is None
        for flips, answers in ((figures.flips_at_zero, 3), (figures.flips_over_seeds, 3)):
            assert flips is not None
            assert (flips.share, flips.low, flips.items, flips.answers) == (0, 0, 10, answers)
            assert flips.high > 0.1  # ten items show no more
    # 12 items; then 2 repeats, 3 seeds and one seed again, of 10 items.
    asked = [body for body in server.bodies if body["max_tokens"]]
    assert len(asked) == 2 * (12 + 10 * (2 + 3 + 1))


def test_planted_instability_is_found(tmp_path):
    """The adapter answers by chance above temperature 0, and its neighbours change it at temperature 0."""
    rng = random.Random(0)
    right = solves(1, 1)

    def unstable(body: dict[str, Any]) -> str:
        return right(body) if rng.random() < 0.5 else "It is 1."

    world = World(tmp_path, 30, stability={"limit": 20})
    stability = world.evaluate(FakeServer({BASE: right, ADAPTER: unstable})).stability
    assert stability is not None
    assert stability.base.flips_over_seeds is not None and stability.base.flips_over_seeds.share == 0
    adapter = stability.adapter
    assert adapter.equal_at_zero is not None and adapter.equal_at_zero < 0.6
    flips = adapter.flips_over_seeds
    assert flips is not None and flips.low > 0.2 and flips.share > 0.4
    assert adapter.self_agreement < 0.9
    shown = adapter.unstable[0]
    assert shown.first != shown.second


def test_another_wording_that_is_answered_otherwise_is_a_flip(tmp_path):
    world = World(tmp_path, 12, stability={"limit": 12})
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    for item in items:
        number = item["reference"]
        item["paraphrases"] = [f"What is {int(number) // 2} and {int(number) // 2} together?"]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    right = solves(1, 1)
    server = FakeServer({BASE: right, ADAPTER: lambda body: "1" if "together" in question_in(body) else right(body)})
    stability = world.evaluate(server).stability
    assert stability is not None
    assert stability.base.flips_over_paraphrases is not None and stability.base.flips_over_paraphrases.share == 0
    found = stability.adapter.flips_over_paraphrases
    assert found is not None and (found.share, found.answers) == (1, 2)
    assert stability.adapter.unstable[0].how == "over paraphrases"


def test_what_is_repeated_alone_is_asked_alone(tmp_path):
    world = World(tmp_path, 6, stability={"limit": 6, "repeats": 1, "temperatures": []})
    server = FakeServer({BASE: solves(1, 1), ADAPTER: solves(1, 1)})
    world.evaluate(server)
    repeats = 2 * 6
    assert len(server.crowds) == 2 * (6 + 6) + repeats  # the others are items and texts
    assert server.crowds[-repeats:] == [1] * repeats
    assert max(server.crowds[:-repeats]) == 8


def judge_server(prefers: Callable[[str, str], str]) -> FakeServer:
    """Base and adapter answer with different words; the judge is a third model of the server."""

    def judge(body: dict[str, Any]) -> str:
        text = question_in(body)
        first, second = (text.split(f"<answer_{name}>\n")[1].split("\n</answer_")[0] for name in "AB")
        return prefers(first, second)

    return FakeServer(
        {BASE: lambda body: "short 0", ADAPTER: lambda body: "a longer answer 1", "judge": judge},
        digests={BASE: "none", ADAPTER: "a" * 64, "judge": "none"},
    )


JUDGE = {"url": "http://fake/v1", "model": "judge", "rubric": "Which is better?"}


def test_a_judge_is_asked_in_both_orders(tmp_path):
    server = judge_server(lambda first, second: "A" if "longer" in first else "B")
    judgement = World(tmp_path, 12, judge=JUDGE).evaluate(server).judge
    assert judgement is not None
    assert (judgement.items, judgement.wins, judgement.ties, judgement.losses) == (12, 12, 0, 0)
    assert judgement.longer_wins == 1
    assert judgement.comparison.verdict == "better"
    assert judgement.low < 1
    assert judgement.rubric == "Which is better?"


def test_a_judge_that_takes_the_first_answer_gives_only_ties(tmp_path):
    judgement = World(tmp_path, 12, judge=JUDGE).evaluate(judge_server(lambda first, second: "A")).judge
    assert judgement is not None
    assert (judgement.wins, judgement.ties, judgement.losses, judgement.disagreements) == (0, 12, 0, 12)
    assert judgement.win_share == 0.5
    assert judgement.comparison.verdict == "not settled"


def test_verdicts_that_cannot_be_read_do_not_count(tmp_path):
    judgement = World(tmp_path, 12, judge=JUDGE).evaluate(judge_server(lambda first, second: "hmm")).judge
    assert judgement is None


def test_a_judge_that_is_away_takes_nothing_else_down(tmp_path):
    server = judge_server(lambda first, second: "A")
    server.fault = lambda number: refused(401, "wrong key") if server.bodies[-1]["model"] == "judge" else None
    evaluation = World(tmp_path, 12, judge=JUDGE).evaluate(server)
    assert evaluation.judge is None
    assert not evaluation.is_complete and evaluation.stopped is None
    assert evaluation.items == 12


# -- one-sidedness and the score card ----------------------------------------------------------------------------------


def test_answers_that_became_one_sided_are_named(tmp_path):
    def varied(body: dict[str, Any]) -> str:
        number = int(question_in(body).split()[2])
        return f"{['Twice', 'Adding', 'That makes', 'We get'][number % 4]} {number} gives {2 * number}."

    def one_sided(body: dict[str, Any]) -> str:
        return (
            f"I am happy to help you with this question today, dear friend, and it is {question_in(body).split()[2]}."
        )

    evaluation = World(tmp_path, 40).evaluate(FakeServer({BASE: varied, ADAPTER: one_sided}))
    text = " ".join(evaluation.one_sidedness.findings)
    assert "100% of the answers begin with 'i am happy'" in text
    assert "longer than those of the base" in text
    japanese = World(tmp_path, 40).evaluate(
        FakeServer({BASE: varied, ADAPTER: lambda body: "はい、そうです。"}, digests={BASE: "none", ADAPTER: "f" * 64})
    )
    text = " ".join(japanese.one_sidedness.findings)
    assert "100% of the answers are in another language than expected" in text
    assert (
        World(tmp_path, 40)
        .evaluate(FakeServer({BASE: varied, ADAPTER: varied}, digests={BASE: "none", ADAPTER: "9" * 64}))
        .one_sidedness.findings
        == []
    )


def test_the_score_card_has_the_newest_evaluation_of_each_suite(tmp_path):
    world = World(tmp_path, 10)
    answers = {BASE: solves(0.5, 1), ADAPTER: solves(0.5, 2)}
    assert read_scorecard(world.storage, ADAPTER) is None
    first = world.evaluate(FakeServer(answers))
    world.evaluate(FakeServer(answers), limit=2)
    other = World(tmp_path, 10, name="other")
    last = other.evaluate(FakeServer(answers))
    card = read_scorecard(world.storage, ADAPTER)
    assert card is not None
    assert set(card.evaluations) == {"sums", "other"}
    assert card.evaluations["other"] == last
    assert card.evaluations["sums"].suite.limit == 2 and card.evaluations["sums"].id != first.id


def test_httpx_errors_of_the_first_contact_name_the_cure(tmp_path):
    server = FakeServer({BASE: solves(1, 1), ADAPTER: solves(1, 1)})
    endpoint = server.endpoint

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    away = type(endpoint)(endpoint.url, transport=httpx.MockTransport(refuse))
    world = World(tmp_path, 3)
    with pytest.raises(ServingError, match=r"does not answer \(ConnectError\). Start one with: ft serve"):
        evaluate(Request(ADAPTER, str(world.suite), world.storage.root), away)
