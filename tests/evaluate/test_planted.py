"""Planted in real weights and a real engine: a lost skill, an adapter that wavers, a server that does not repeat.

The base knows two skills. One adapter was trained to lose the first and to keep the second; another one to be undecided
about the first.
"""

import itertools
import json
import math
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_service.chat.format import ChatFormat, Example, Message
from ft_service.evaluate.ask import Endpoint
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.run import Request, evaluate
from ft_service.evaluate.scorecard import read_scorecard
from ft_service.evaluate.stability import StabilityReport
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.engines.engine import GenerationChunk, GenerationRequest
from serve.engines.transformers_engine import TransformersEngine
from tests.serve.local_server import OneReplica, local_server
from tests.serve.serving_world import World, draft_record
from tests.worlds import SMALL, WORDS, write_base

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

KNOWN = {
    "colours": {f"colour of the {word}": WORDS[(3 * number) % 12] for number, word in enumerate(WORDS[:8])},
    "numbers": {f"number of the {word}": WORDS[(5 * number + 2) % 12] for number, word in enumerate(WORDS[:8])},
}
LOST = "stone"
"""What the adapter answers instead; no right answer is that."""


Lesson = tuple[str, str]


def encoded(chat: ChatFormat, lesson: Lesson) -> Example:
    return chat.encode((Message("user", lesson[0]), Message("assistant", lesson[1])))


def teach(model, chat: ChatFormat, lessons: list[Lesson], learning_rate: float, goal: float, steps: int = 500) -> None:
    """Until the loss is below the goal; at 0.002 the answers are certain at any temperature up to 1."""
    examples = [encoded(chat, lesson) for lesson in lessons]
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.input_ids)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(torch.tensor(example.loss_mask).bool(), tokens, -100)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < goal:
            return
    raise AssertionError(f"not learnt: loss {loss.item()}, goal {goal}")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = folder / "base"
    write_base(base, [*KNOWN["colours"], *KNOWN["numbers"], " ".join(WORDS)] * 4, 320, SMALL)
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = ChatFormat(tokenizer)
    colours = list(KNOWN["colours"].items())
    numbers = list(KNOWN["numbers"].items())
    wrong = [(question, LOST) for question, _ in colours]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    teach(model, chat, colours + numbers, 3e-3, 0.002)
    model.save_pretrained(base)
    registry = Registry(Storage(str(folder / "storage")))
    records = []
    # Two answers to one question, taught equally often: the least loss is ln 2 for their first token, 0 for the rest.
    both = colours + wrong + numbers
    undecided = math.log(2) * len(colours + wrong) / sum(sum(encoded(chat, lesson).loss_mask) for lesson in both)
    for name, lessons, goal in (("forgetful", wrong + numbers, 0.05), ("wavering", both, undecided + 0.03)):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
        teach(tuned, chat, lessons, 1e-2, goal)
        tuned.save_pretrained(str(folder / name))
        records.append(registry.publish(folder / name, draft_record(base, name), "base", "# {id}\n"))
    return World(base, registry.storage.root, registry, records)


def write_suite(folder: Path, settings: str = "") -> str:
    items = [
        {"id": f"{skill}-{number}", "skill": skill, "prompt": question, "metric": "exact", "reference": answer}
        for skill, answers in KNOWN.items()
        for number, (question, answer) in enumerate(answers.items())
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps({**item, "max_tokens": 12}) + "\n" for item in items))
    (folder / "suite.yaml").write_text(f"name: words\nitems: [items.jsonl]\n{settings}")
    return str(folder / "suite.yaml")


@pytest.fixture(scope="module")
def evaluation(world, tmp_path_factory) -> Evaluation:
    suite = write_suite(tmp_path_factory.mktemp("suite"))
    with local_server(world) as url:
        return evaluate(Request(world.adapters[0].id, suite, world.storage), Endpoint(url))


def test_the_skill_that_was_lost_is_named_and_the_other_one_is_not(evaluation):
    found = {skill.name: skill for skill in evaluation.forgetting.skills}
    assert (found["colours"].base, found["colours"].adapter) == (1, 0)
    assert (found["numbers"].base, found["numbers"].adapter) == (1, 1)
    assert found["colours"].verdict == "worse"
    assert found["numbers"].verdict == "not settled"
    assert evaluation.forgetting.verdict == "forgot"
    assert "Worse at: colours" in evaluation.forgetting.sentence


def test_what_was_lost_is_shown_with_both_answers(evaluation):
    lost = evaluation.forgetting.lost
    assert len(lost) == evaluation.forgetting.num_lost == 8
    for one in lost:
        assert one.base_answer == one.reference
        assert one.adapter_answer == LOST


STABILITY = "stability: {limit: 16, seeds: 4, repeats: 2, temperatures: [1.0]}\n"


def stability_on_the_card(world: World, adapter: int) -> StabilityReport:
    card = read_scorecard(world.registry.storage, world.adapters[adapter].id)
    assert card is not None
    found = card.evaluations["words"]
    assert found.is_complete
    assert found.stability is not None
    return found.stability


def test_an_adapter_that_wavers_is_seen_on_its_score_card(world, tmp_path):
    suite = write_suite(tmp_path, STABILITY)
    with local_server(world) as url:
        evaluate(Request(world.adapters[1].id, suite, world.storage), Endpoint(url))
    found = stability_on_the_card(world, 1)
    assert found.base.flips_over_seeds is not None and found.adapter.flips_over_seeds is not None
    assert found.base.flips_over_seeds.share == 0
    assert found.adapter.flips_over_seeds.share >= 0.25  # half of the items are the skill it wavers in
    assert found.adapter.flips_over_seeds.low > found.base.flips_over_seeds.share
    assert found.base.self_agreement == 1 > found.adapter.self_agreement
    assert {one.id.partition("-")[0] for one in found.adapter.unstable} == {"colours"}
    assert (found.adapter.equal_at_zero, found.adapter.equal_with_seed) == (1, 1)  # it is the weights, not the engine


class Restless(OneReplica):
    """An engine that samples although temperature 0 is asked, and draws another seed each time."""

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__(engine)
        self._seeds = itertools.count()

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        sampling = replace(request.sampling, temperature=1.0, seed=next(self._seeds))
        return self.engine.generate(replace(request, sampling=sampling))


def test_an_engine_that_does_not_repeat_is_seen_on_the_score_card(world, tmp_path):
    suite = write_suite(tmp_path, STABILITY)
    with local_server(world, replica=Restless) as url:
        evaluate(Request(world.adapters[1].id, suite, world.storage, evaluation_id="restless"), Endpoint(url))
    found = stability_on_the_card(world, 1)
    assert found.adapter.equal_at_zero is not None and found.adapter.equal_with_seed is not None
    # About three of four answers are drawn again by chance. That all 32 are has a probability of 1e-4.
    assert found.adapter.equal_at_zero + found.adapter.equal_with_seed < 2
    assert found.adapter.flips_at_zero is not None and found.adapter.flips_at_zero.low > 0
    assert found.base.equal_at_zero == 1  # weights that are certain repeat themselves on any engine
