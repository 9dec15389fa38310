"""Planted forgetting in real weights: an adapter that was trained to lose one skill, and to keep another one."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ft_service.chat.format import ChatFormat, Message
from ft_service.evaluate.ask import Endpoint
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.run import Request, evaluate
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from tests.serve.local_server import local_server
from tests.serve.serving_world import World, draft_record
from tests.worlds import SMALL, WORDS, write_base

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

KNOWN = {
    "colours": {f"colour of the {word}": WORDS[(3 * number) % 12] for number, word in enumerate(WORDS[:8])},
    "numbers": {f"number of the {word}": WORDS[(5 * number + 2) % 12] for number, word in enumerate(WORDS[:8])},
}
LOST = "stone"
"""What the adapter answers instead; no right answer is that."""


def teach(model, chat: ChatFormat, answers: dict[str, str], learning_rate: float, steps: int = 400) -> None:
    """Until the answers are as good as certain."""
    examples = [chat.encode((Message("user", one), Message("assistant", answer))) for one, answer in answers.items()]
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
        if loss.item() < 0.05:
            return
    raise AssertionError(f"not learnt: loss {loss.item()}")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = folder / "base"
    write_base(base, [*KNOWN["colours"], *KNOWN["numbers"], " ".join(WORDS)] * 4, 320, SMALL)
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = ChatFormat(tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    teach(model, chat, {**KNOWN["colours"], **KNOWN["numbers"]}, 3e-3)
    model.save_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    teach(tuned, chat, {**dict.fromkeys(KNOWN["colours"], LOST), **KNOWN["numbers"]}, 1e-2)
    tuned.save_pretrained(str(folder / "adapter"))
    registry = Registry(Storage(str(folder / "storage")))
    record = registry.publish(folder / "adapter", draft_record(base, "forgetful"), "base", "# {id}\n")
    return World(base, registry.storage.root, registry, [record])


@pytest.fixture(scope="module")
def evaluation(world, tmp_path_factory) -> Evaluation:
    folder: Path = tmp_path_factory.mktemp("suite")
    items = [
        {"id": f"{skill}-{number}", "skill": skill, "prompt": question, "metric": "exact", "reference": answer}
        for skill, answers in KNOWN.items()
        for number, (question, answer) in enumerate(answers.items())
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps({**item, "max_tokens": 12}) + "\n" for item in items))
    (folder / "suite.yaml").write_text("name: words\nitems: [items.jsonl]\n")
    with local_server(world) as url:
        return evaluate(Request(world.adapters[0].id, str(folder / "suite.yaml"), world.storage), Endpoint(url))


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
