"""Evaluations over real servers of small models, held against stock transformers; a killed one goes on."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from ft_service.data.dataset import open_dataset
from ft_service.errors import UsageError
from ft_service.evaluate.ask import BASE_HEADER, DIGEST_HEADER, Endpoint
from ft_service.evaluate.evaluation import Evaluation, read_results
from ft_service.evaluate.run import Request, evaluate
from ft_service.registry.promotions import Promotions, alias_of
from ft_service.registry.registry import Registry
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from tests.serve.local_server import local_server
from tests.serve.serving_world import World, publish_adapter
from tests.worlds import prepared_run, write_world

pytestmark = pytest.mark.multiprocess

PROJECT = Path(__file__).resolve().parents[2]
RUN = "run-1-1"
"""The run that the adapter of `publish_adapter` names."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_records=60)
    prepared_run(folder, RUN, num_workers=1)
    registry = Registry(Storage(str(folder / "storage")))
    adapter = publish_adapter(registry, folder / "base", folder / "adapter", 1)
    return World(folder / "base", registry.storage.root, registry, [adapter])


@pytest.fixture(scope="module")
def url(world) -> Iterator[str]:
    with local_server(world) as address:
        yield address


def write_suite(folder: Path, text: str, num_items: int = 6) -> str:
    items = [
        {
            "id": f"i{number}",
            "skill": "words",
            "prompt": f"Last word of: red green {number}",
            "metric": "f1",
            "reference": "green",
            "max_tokens": 8,
        }
        for number in range(num_items)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "suite.yaml").write_text(f"name: words\nitems: [items.jsonl]\n{text}")
    return str(folder / "suite.yaml")


@pytest.fixture(scope="module")
def evaluation(world, url, tmp_path_factory) -> Evaluation:
    folder = tmp_path_factory.mktemp("suite")
    suite = write_suite(
        folder,
        "held_out: [{run: true, metrics: [exact, f1], max_tokens: 4}]\nstability: {limit: 4, repeats: 2, seeds: 2}\n",
    )
    return evaluate(Request(world.adapters[0].id, suite, world.storage), Endpoint(url))


def test_the_result_names_the_weights_that_answered(world, evaluation):
    adapter = world.adapters[0]
    assert evaluation.is_complete, evaluation.failures
    assert evaluation.adapter.digest == adapter.digest
    assert evaluation.base.digest is None
    assert evaluation.adapter.base_fingerprint == evaluation.base.base_fingerprint == adapter.base.fingerprint
    assert evaluation.engine.version and evaluation.engine.replicas == 1
    assert evaluation.base.chat_template_digest


def stock_loss(world: World, ids: list[int], num_answer_tokens: int, adapter: bool) -> float:
    """Sum of the losses of the last tokens, by transformers and peft."""
    values = world.stock_logprobs(ids, world.adapters[0] if adapter else None)
    chosen = values[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return -float(chosen[-num_answer_tokens:].sum())


def validation_documents(world: World) -> list[tuple[list[int], int]]:
    """Token ids of each validation document up to its answer's end, and how many of them are trained on."""
    storage = Storage(world.storage)
    validation = open_dataset(storage, RunFolder(storage, RUN).plan().dataset.digest).validation
    assert validation is not None
    documents = []
    for index in range(len(validation)):
        row = validation[index]
        at = 0
        for length in row.document_lengths:
            mask = row.loss_mask[at : at + length].astype(bool)
            last = int(mask.nonzero()[0][-1]) + 1
            documents.append((row.input_ids[at : at + last].tolist(), int(mask.sum())))
            at += length
    return documents


def test_the_validation_loss_is_that_of_stock_code_on_the_runs_own_split(world, evaluation):
    documents = validation_documents(world)
    loss = evaluation.validation_loss
    assert loss is not None
    assert loss.texts == len(documents)
    tokens = sum(count for _, count in documents)
    assert loss.tokens == tokens
    for adapter, found in ((False, loss.base), (True, loss.adapter)):
        expected = math.fsum(stock_loss(world, ids, count, adapter) for ids, count in documents) / tokens
        assert found == pytest.approx(expected, abs=1e-4)


def test_answers_to_the_runs_own_questions_are_those_of_stock_code(world, evaluation):
    ids, count = validation_documents(world)[0]
    tokenizer = world.tokenizer
    reference = tokenizer.decode(ids[-count:], skip_special_tokens=True).strip()
    question = tokenizer.decode(ids[:-count], skip_special_tokens=True)
    results = read_results(Storage(world.storage), evaluation.id)
    result = next(
        one for one in results if one.skill == "held_out" and one.prompt in question and one.reference == reference
    )
    for adapter, text in ((None, result.base.text), (world.adapters[0], result.adapter.text)):
        stock = world.stock_answer(ids[:-count], 4, adapter)
        expected = tokenizer.decode(stock, skip_special_tokens=True)
        assert text == expected.removesuffix("\N{REPLACEMENT CHARACTER}")


def test_perplexity_of_the_prompts_is_that_of_stock_code(world, evaluation):
    texts = evaluation.forgetting.texts
    assert texts is not None
    total = 0.0
    tokens = 0
    for number in range(6):
        ids = world.tokenizer(f"Last word of: red green {number}")["input_ids"]
        total += stock_loss(world, ids, len(ids) - 1, adapter=True)
        tokens += len(ids) - 1
    assert texts.tokens == tokens
    assert texts.adapter == pytest.approx(total / tokens, abs=1e-4)


def test_the_server_repeats_itself_bit_for_bit(evaluation):
    stability = evaluation.stability
    assert stability is not None
    for figures in (stability.base, stability.adapter):
        assert figures.equal_at_zero == 1
        assert figures.equal_with_seed == 1


def test_the_loss_of_a_file_is_that_of_the_answers_it_has(world, url, tmp_path):
    """The same record from a file and from the run's split has the same tokens, so the same loss."""
    ids, count = validation_documents(world)[0]
    answer = world.tokenizer.decode(ids[-count:], skip_special_tokens=True).strip()
    text = world.tokenizer.decode(ids, skip_special_tokens=False)
    question = text.split("user<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]
    (tmp_path / "held.jsonl").write_text(json.dumps({"instruction": question, "output": answer}))
    suite = write_suite(tmp_path, "held_out: [{path: held.jsonl, max_tokens: 2}]\n", 1)
    found = evaluate(Request(world.adapters[0].id, suite, world.storage), Endpoint(url)).validation_loss
    assert found is not None
    assert found.tokens == count
    assert found.adapter == pytest.approx(stock_loss(world, ids, count, adapter=True) / count, abs=1e-4)


def test_replies_to_the_alias_of_a_promoted_adapter_name_the_adapter_that_answered(world, url):
    adapter = world.adapters[0]
    promotions = Promotions(world.registry)
    promotions.promote(adapter, None, [])
    alias = alias_of(adapter)
    body = {"messages": [{"role": "user", "content": "Last word of: red green"}], "max_tokens": 4, "temperature": 0}
    try:
        replies = [
            httpx.post(f"{url}/chat/completions", json={**body, "model": model}) for model in (alias, adapter.id)
        ]
    finally:
        promotions.demote(alias)
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.json()["model"] == adapter.id
        assert reply.headers[DIGEST_HEADER] == adapter.digest
        assert reply.headers[BASE_HEADER] == adapter.base.fingerprint
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts[0] == texts[1]


PIECES = "*.jsonl"
"""Others were being written when their process was killed."""


def ft_evaluate(world: World, url: str, suite: str, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ft_service.cli.app", "evaluate", world.adapters[0].id, "--suite", suite]
    return subprocess.Popen(
        [*command, "--storage", world.storage, "--server", url, "--id", "killed", *options],
        cwd=PROJECT,
        env={**os.environ, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_evaluation_goes_on_where_it_was(world, url, tmp_path):
    suite = write_suite(tmp_path, "", num_items=400)
    answers = Path(world.storage) / "evaluations/killed/answers"
    killed = ft_evaluate(world, url, suite, "--concurrency", "4")
    while not (answers.is_dir() and len(list(answers.glob(PIECES))) >= 2):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = sum(len(piece.read_text().splitlines()) for piece in answers.glob(PIECES))
    assert 0 < kept < 1600
    resumed = ft_evaluate(world, url, suite, "--json")
    output, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    result = json.loads(output)
    assert result["is_complete"] and result["items"] == 400
    pieces = [line for piece in answers.glob(PIECES) for line in piece.read_text().splitlines()]
    assert len(pieces) == 1600  # items and texts of both models, each answered once
    assert f"{kept:,} of 1,600" in errors
    shown = ft_evaluate(world, url, suite)
    output, _ = shown.communicate()
    assert shown.returncode == 0
    assert "words" in output and "Not settled" in output and "verdict" in output


# -- lm-eval -----------------------------------------------------------------------------------------------------------

TASK = """
task: ft_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with a task of this test's own, and a suite that names it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = [
        {"question": f"Last word of: red {one}", "choices": [" green", f" {one}", " two"], "gold": 1}
        for one in ("cat", "dog", "house", "tree", "river", "stone", "one", "blue")
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "words.yaml").write_text(TASK.format(data=folder / "items.jsonl"))
    (tmp_path / "lm.yaml").write_text("name: lm\nlm_eval: {tasks: [ft_words], folder: tasks}\n")
    return folder


def test_tasks_of_lm_eval_are_those_of_the_weights_themselves(world, url, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    request = Request(world.adapters[0].id, str(tasks.parent / "lm.yaml"), world.storage)
    evaluation = evaluate(request, Endpoint(url))
    assert evaluation.is_complete, evaluation.left_out
    found = {comparison.name: comparison for comparison in evaluation.lm_eval}
    assert found["ft_words (acc)"].items == 8
    for arguments, side in (
        ({}, "base"),
        ({"peft": str(world.registry.folder(world.adapters[0]))}, "adapter"),
    ):
        local = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(world.base), "device": "cpu", "dtype": "float32", **arguments},
            tasks=["ft_words"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0,
        )
        assert local is not None
        for metric in ("acc", "acc_norm"):
            assert getattr(found[f"ft_words ({metric})"], side) == local["results"]["ft_words"][f"{metric},none"]


def test_a_failing_lm_eval_takes_nothing_else_down(world, url, tasks):
    (tasks / "items.jsonl").write_text("{broken")
    suite = write_suite(tasks.parent, f"lm_eval: {{tasks: [ft_words], folder: {tasks}}}\n")
    evaluation = evaluate(Request(world.adapters[0].id, suite, world.storage), Endpoint(url))
    assert not evaluation.is_complete
    assert evaluation.lm_eval == [] and evaluation.items == 6
    assert any(text.startswith("lm_eval.tasks = ft_words: ") for text in evaluation.left_out)


def test_an_unknown_task_is_refused_before_anything_is_asked(world, tmp_path):
    (tmp_path / "lm.yaml").write_text("name: lm\nlm_eval: {tasks: [no_such_task]}\n")
    with pytest.raises(UsageError, match="'no_such_task': lm-eval has no such task"):
        evaluate(
            Request(world.adapters[0].id, str(tmp_path / "lm.yaml"), world.storage), Endpoint("http://127.0.0.1:9")
        )


# -- Inspect AI --------------------------------------------------------------------------------------------------------

INSPECT = shutil.which(os.environ.get("FT_INSPECT", "inspect"))
INSPECT_TASK = """
import json
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate

@task
def words():
    samples = [Sample(id=id, input=question, target=answer) for id, question, answer in json.loads({samples!r})]
    return Task(dataset=samples, solver=generate(max_tokens=8), scorer=match(location="exact"))
"""


@pytest.mark.skipif(
    INSPECT is None, reason="Inspect AI needs an environment of its own (docs/evaluation.md); name it in FT_INSPECT."
)
def test_inspect_ai_asks_the_same_server_the_same_questions(world, url, tmp_path):
    """The target of each sample is what the base itself answers, so the base is right on all of them."""
    questions = [f"Last word of: red {word}" for word in ("cat", "dog", "house", "tree", "river", "stone")]
    answers = [asked(url, served_base(url), question) for question in questions]
    adapter_answers = [asked(url, world.adapters[0].id, question) for question in questions]
    samples = [[f"s{number}", *pair] for number, pair in enumerate(zip(questions, answers, strict=True))]
    (tmp_path / "words.py").write_text(INSPECT_TASK.format(samples=json.dumps(samples)))
    (tmp_path / "suite.yaml").write_text(f"name: inspect\ninspect_ai: {{tasks: [words.py], command: {INSPECT}}}\n")
    request = Request(world.adapters[0].id, str(tmp_path / "suite.yaml"), world.storage)
    evaluation = evaluate(request, Endpoint(url))
    assert evaluation.is_complete, evaluation.left_out
    (found,) = evaluation.inspect_ai
    assert (found.name, found.items, found.base) == ("words (match)", 6, 1.0)
    same = [before == after for before, after in zip(answers, adapter_answers, strict=True)]
    assert found.adapter == sum(same) / 6


def served_base(url: str) -> str:
    models = httpx.get(f"{url}/models").json()["data"]
    return next(str(model["id"]) for model in models if not model.get("parent"))


def asked(url: str, model: str, question: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 8, "temperature": 0}
    return str(httpx.post(f"{url}/chat/completions", json=body).json()["choices"][0]["message"]["content"])
