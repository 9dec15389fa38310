"""Studies are made whole or not at all: models asked, answers bound to weights, an interrupted command goes on."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from ft_service.errors import DataError, ServingError, UsageError
from ft_service.evaluate.ask import Endpoint
from ft_service.storage.storage import Storage
from serve.database.database import open_database
from serve.voting import questions
from serve.voting.files import StudyFolder
from serve.voting.prepare import StudyRequest, create_study
from serve.voting.studies import study_links, study_names_in
from tests.browser import served
from tests.serve.voting.voting_world import Rater, voting_api

ADAPTERS = {"tiny-desk-0a1b2c3d": "a" * 64, "tiny-shop-4e5f6a7b": "c" * 64}
BASE = "b" * 64
ALIAS = "tiny-desk@promoted"


@dataclass
class FakeServer:
    """A /v1 with two adapters and their base, whose answers name the question, the seed and nothing else."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    fail_after: int | None = None
    texts_asked: int = 0
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    digests: dict[str, str] = field(default_factory=lambda: dict(ADAPTERS))

    def entry(self, model: str) -> dict[str, Any]:
        digest = self.digests.get(model)
        record = {"run_id": "run-1", "chat_template_digest": "t" * 8} if digest else None
        parent = "tiny" if digest else None
        if model == ALIAS:
            return {**self.entry(next(iter(ADAPTERS))), "id": ALIAS, "root": next(iter(ADAPTERS))}
        return {
            "id": model,
            "root": "tiny",
            "parent": parent,
            "digest": digest,
            "base_fingerprint": BASE,
            "record": record,
        }

    def api(self) -> FastAPI:
        api = FastAPI()

        @api.get("/v1/models")
        def models() -> dict[str, Any]:
            return {"data": [self.entry(model) for model in ("tiny", *self.digests, ALIAS)]}

        @api.get("/v1/models/{model}")
        def model(model: str) -> dict[str, Any]:
            return self.entry(model)

        @api.post("/v1/detokenize")
        async def detokenize(request: Request) -> dict[str, Any]:
            ids = (await request.json())["tokens"]
            self.texts_asked += 1
            text = "".join(f"<|start_header_id|>user<|end_header_id|>\n\nheld out {one}<|eot_id|>" for one in ids)
            return {"prompt": text}

        @api.post("/v1/chat/completions")
        def complete(body: dict[str, Any]) -> JSONResponse:
            with self.lock:
                self.asked.append(body)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                number = len(self.asked)
            try:
                if self.fail_after is not None and number > self.fail_after:
                    return JSONResponse({"error": {"message": "no such model now"}}, 404)
                return self.reply(body)
            finally:
                with self.lock:
                    self.at_once -= 1

        return api

    def reply(self, body: dict[str, Any]) -> JSONResponse:
        question = body["messages"][-1]["content"]
        text = f"{'good' if body['model'] in self.digests else 'bad'} answer to {question}, seed {body['seed']}"
        message = {"role": "assistant", "content": text}
        reason = "length" if "long" in question else "stop"
        reply = {"model": body["model"], "choices": [{"message": message, "finish_reason": reason}]}
        headers = {"x-adapter-digest": self.digests.get(body["model"], "none"), "x-base-fingerprint": BASE}
        return JSONResponse(reply, headers=headers)


@dataclass
class World:
    server: FakeServer
    url: str
    folder: Path

    @property
    def database(self) -> str:
        return f"sqlite:///{self.folder}/service.db"

    @property
    def storage(self) -> Storage:
        return Storage(str(self.folder / "storage"))

    def create(self, request: StudyRequest):
        return create_study(open_database(self.database), self.storage, Endpoint(self.url), request)


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    server = FakeServer()
    with served(server.api()) as url:
        yield World(server, url, tmp_path)


@pytest.fixture
def request_(tmp_path) -> StudyRequest:
    file = tmp_path / "questions.jsonl"
    lines = [
        {"prompt": "one"},
        {"prompt": "two", "system": "Be brief.", "id": "my-two"},
        {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "left out"}]},
        {"instruction": "long four", "input": "with input"},
        {"prompt": "one"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return StudyRequest(
        name="desk",
        adapters=("tiny-desk-0a1b2c3d",),
        base=True,
        questions=str(file),
        raters=("anna", "bert", "cleo"),
        votes_per_item=2,
        controls=0.25,
        repeats=0.0,
        concurrency=3,
    )


def test_a_study_is_bound_to_weights_questions_and_answers_and_can_be_voted_on(world, request_):
    created = world.create(request_)
    study, digest = StudyFolder(world.storage, "desk").read()
    assert study == created.study
    assert [(model.id, model.adapter_digest, model.base_fingerprint) for model in study.models] == [
        ("tiny-desk-0a1b2c3d", "a" * 64, BASE),
        ("tiny", None, BASE),
    ]
    assert study.models[0].template_digest == "t" * 8
    assert [turn.content for question in study.questions for turn in question.turns] == [
        "one",
        "Be brief.",
        "two",
        "three",
        "long four\n\nwith input",
    ]
    assert study.questions[1].name == "my-two" and study.questions[0].name == "questions.jsonl:1"
    real = [one for one in study.comparisons if one.kind == "real"]
    assert [(one.first.text, one.second.text) for one in real][:1] == [
        ("good answer to one, seed 0", "bad answer to one, seed 0")
    ]
    assert created.num_cut >= 2 and real[3].first.is_cut and not real[0].first.is_cut
    (control, *_) = [one for one in study.comparisons if one.kind == "control"]
    assert control.first.model == control.second.model and control.first.text != control.second.text
    assert len({one.digest for one in study.comparisons}) == len(study.comparisons)
    assert world.server.most_at_once <= 3
    assert not world.storage.files("studies/desk/draft/answers")
    assert len(digest) == 64
    client = TestClient(voting_api(world.database, world.storage.root))
    link = study_links(open_database(world.database), "desk", world.url)["anna"]
    rater = Rater(client, link.partition("#")[2])
    assert len(rater.vote_all()) == len([one for one in study.assignments if one.rater == study.raters[0]])


def test_an_interrupted_study_is_not_there_and_asks_only_the_rest(world, request_):
    world.server.fail_after = 5
    request_ = replace(request_, concurrency=1)
    with pytest.raises(ServingError, match=r"answers are missing \(.*no such model now\)"):
        world.create(request_)
    assert study_names_in(open_database(world.database)) == []
    assert not StudyFolder(world.storage, "desk").exists()
    world.server.fail_after = None
    kept = len(world.server.asked) - 1
    world.create(request_)
    asked = [json.dumps(one, sort_keys=True) for one in world.server.asked]
    assert kept == 5 and len(asked) == len(set(asked)) + 1
    assert study_names_in(open_database(world.database)) == ["desk"]


def test_what_an_interrupted_command_has_left_is_in_no_study(world, request_):
    world.storage.write_bytes("studies/desk/raters/feedfeedfeedfeed.json", b"{")
    created = world.create(request_)
    assert len(created.study.raters) == 3
    assert {rater.name for rater in StudyFolder(world.storage, "desk").raters(created.study)} == {
        "anna",
        "bert",
        "cleo",
    }


def test_weights_that_change_in_between_are_an_error_and_no_study(world, request_):
    world.server.fail_after = 3
    with pytest.raises(ServingError):
        world.create(request_)
    world.server.fail_after = None
    world.server.digests["tiny-desk-0a1b2c3d"] = "d" * 64
    with pytest.raises(ServingError, match="other weights answer than before"):
        world.create(request_)
    assert study_names_in(open_database(world.database)) == []


def test_a_name_is_for_one_study(world, request_):
    world.create(request_)
    with pytest.raises(UsageError, match="a study of this name exists"):
        world.create(request_)
    other = World(world.server, world.url, world.folder)
    open_database(f"sqlite:///{world.folder}/new.db")
    (world.folder / "service.db").rename(world.folder / "old.db")
    with pytest.raises(UsageError, match="ft study rebuild desk"):
        other.create(request_)


def test_three_models_are_compared_in_pairs(world, request_):
    created = world.create(replace(request_, adapters=tuple(ADAPTERS), controls=0.0))
    pairs = {(one.first.model, one.second.model) for one in created.study.comparisons}
    first, second = ADAPTERS
    assert pairs == {(first, second), (first, "tiny"), (second, "tiny")}
    assert len(created.study.comparisons) == 12 and len(created.study.assignments) == 24


def test_a_promoted_adapter_is_compared_under_its_own_id(world, request_):
    created = world.create(replace(request_, adapters=(ALIAS,)))
    assert created.study.model_ids == ["tiny-desk-0a1b2c3d", "tiny"]
    with pytest.raises(UsageError, match="at least two models"):
        world.create(replace(request_, name="other", adapters=(ALIAS, "tiny-desk-0a1b2c3d"), base=False))


def test_attention_items_show_answers_of_nobody(world, request_, tmp_path):
    file = tmp_path / "attention.jsonl"
    file.write_text('{"prompt": "2 + 2?", "good": "4", "bad": "A banana"}\n')
    created = world.create(replace(request_, attention=file))
    (item,) = [one for one in created.study.comparisons if one.kind == "attention"]
    assert (item.first.model, item.first.text, item.second.text) == (None, "4", "A banana")
    own = [one for one in created.study.assignments if one.kind == "attention"]
    assert {one.rater for one in own} == set(created.study.raters)
    assert not any(body["messages"][-1]["content"] == "2 + 2?" for body in world.server.asked)


def test_questions_from_the_validation_split_of_the_adapters_run(world, request_, monkeypatch):
    row = SimpleNamespace(
        input_ids=np.array([7, 9, 1, 8, 2, 5]),
        loss_mask=np.array([False, False, True, False, True, True]),
        document_lengths=np.array([3, 2, 1]),
    )
    dataset = SimpleNamespace(validation=[row], digest="d" * 64)
    asked: list[str] = []
    monkeypatch.setattr(questions, "open_dataset", lambda storage, digest: dataset)
    plan = SimpleNamespace(dataset=SimpleNamespace(digest="d" * 64))

    def run_folder(storage: Storage, run: str) -> SimpleNamespace:
        asked.append(run)
        return SimpleNamespace(plan=lambda: plan)

    monkeypatch.setattr(questions, "RunFolder", run_folder)
    created = world.create(replace(request_, questions="held-out"))
    assert asked == ["run-1"]
    assert created.study.settings.questions_digest == "d" * 64
    assert [[turn.content for turn in question.turns] for question in created.study.questions] == [
        ["held out 7", "held out 9"],
        ["held out 8"],
    ]
    few = world.create(replace(request_, name="few", questions="held-out", limit=1, seed=3))
    assert len(few.study.questions) == 1
    assert world.server.texts_asked == 2 + 1, "texts are asked for only as many as needed"
    dataset.validation = None
    with pytest.raises(DataError, match="had no validation data"):
        world.create(replace(request_, name="other", questions="held-out:run-2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": False}, "compares at least two models"),
        ({"adapters": ()}, "compares at least two models"),
        ({"adapters": ("tiny-desk-0a1b2c3d", "nobody")}, "the server has no nobody"),
        ({"adapters": ("tiny",), "base": True}, "at least two models"),
        ({"adapters": ("tiny-desk-0a1b2c3d", "tiny-desk-0a1b2c3d")}, "named twice"),
        ({"raters": ()}, "--raters"),
        ({"raters": ("anna", "anna")}, "anna is named twice"),
        ({"votes_per_item": 4}, "--votes-per-item = 4"),
        ({"repeats": 0.6}, "--repeats = 0.6"),
        ({"controls": -0.1}, "--controls = -0.1"),
        ({"axes": ("a;b",)}, "--axes"),
        ({"name": "Desk!"}, "NAME = 'Desk!'"),
    ],
)
def test_options_that_do_not_fit_are_named_before_anything_is_asked(world, request_, change, message):
    with pytest.raises(UsageError, match=message):
        world.create(replace(request_, **change))
    assert world.server.asked == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{", "line 1"),
        ('{"prompt": "x"}\n[1]\n{"prompt": ""}\n', "line 2: is no JSON object; line 3: `prompt` is no text"),
        ('{"text": "x"}\n', "has neither `prompt`"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "asks nothing"),
        ('{"messages": [{"role": "judge", "content": "x"}]}\n', "line 1"),
        ('{"messages": "x"}\n', "line 1"),
    ],
)
def test_questions_that_cannot_be_used_are_named_by_line(world, request_, content, message):
    Path(request_.questions).write_text(content)
    with pytest.raises(DataError) as caught:
        world.create(request_)
    assert message in str(caught.value)
    assert world.server.asked == []
