"""A small study, made without a server, and a rater who answers over HTTP."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from sqlalchemy import Engine

from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.inference.models import ServedModels
from serve.settings import ServeSettings
from serve.voting.draw import draw_assignments
from serve.voting.files import (
    Comparison,
    PreparedAnswer,
    Question,
    RaterFile,
    Settings,
    StudyFile,
    StudyFolder,
    StudyModel,
    Turn,
)
from serve.voting.studies import open_study, study_links

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
MODELS = ("tiny-desk-0a1b2c3d", "tiny")


@dataclass(frozen=True)
class Voting:
    """An open study."""

    engine: Engine
    storage: Storage
    study: StudyFile

    @property
    def folder(self) -> StudyFolder:
        return StudyFolder(self.storage, self.study.name)

    def links(self, server: str = "http://server") -> dict[str, str]:
        return study_links(self.engine, self.study.name, server)

    def token(self, rater: str) -> str:
        return self.links()[rater].partition("#")[2]

    def assignment(self, assignment: str) -> Any:
        return next(one for one in self.study.assignments if one.id == assignment)

    def comparison(self, assignment: str) -> Comparison:
        wanted = self.assignment(assignment).comparison
        return next(one for one in self.study.comparisons if one.id == wanted)


def id_of(number: int) -> str:
    return f"{number:016x}"


def make_study(
    engine: Engine,
    folder: Path | str,
    *,
    name: str = "desk",
    questions: int = 6,
    raters: Sequence[str] = ("anna", "bert"),
    votes_per_item: int = 2,
    axes: Sequence[str] = (),
    repeats: float = 0.0,
    controls: int = 0,
    attention: int = 0,
    reveal: str = "vote",
    texts: Sequence[tuple[str, str, str]] = (),
) -> Voting:
    """Write a study to storage and open it. `controls` and `attention` are numbers of comparisons.

    `texts` are question, first answer and second answer; without them they are numbered.
    """
    storage = Storage(str(folder))
    texts = texts or [(f"Question {n}?", f"good answer {n}", f"bad answer {n}") for n in range(questions)]
    asked = [
        Question(id=f"{name}-q{n}", name=f"file:{n}", turns=[Turn(role="user", content=text)])
        for n, (text, _, _) in enumerate(texts)
    ]
    comparisons = [
        _comparison(f"{name}-c{n}", asked[n], "real", (MODELS[0], first), (MODELS[1], second))
        for n, (_, first, second) in enumerate(texts)
    ]
    comparisons += [
        _comparison(f"{name}-k{n}", asked[n], "control", (MODELS[0], texts[n][1]), (MODELS[0], f"other answer {n}"))
        for n in range(controls)
    ]
    for number in range(attention):
        turn = Turn(role="user", content="What is 2 + 2?")
        asked.append(Question(id=f"{name}-a{number}", name=f"attention:{number}", turns=[turn]))
        pair = ((None, "4"), (None, "A green banana"))
        comparisons.append(_comparison(f"{name}-x{number}", asked[-1], "attention", *pair))
    files = [RaterFile(id=f"{name}-r{n}", name=rater) for n, rater in enumerate(raters)]
    ids = [file.id for file in files]
    study = StudyFile(
        name=name,
        title="Help desk",
        created=datetime.now(UTC),
        settings=Settings.model_validate(
            {
                "votes_per_item": votes_per_item,
                "repeats": repeats,
                "controls": 0.2 if controls else 0,
                "axes": list(axes),
                "reveal": reveal,
                "seed": 1,
                "temperature": 0.7,
                "max_tokens": 100,
                "questions": "questions.jsonl",
                "questions_digest": "d" * 64,
                "attention_digest": None,
            }
        ),
        models=[
            StudyModel(id=MODELS[0], adapter_digest="a" * 64, base_fingerprint="b" * 64),
            StudyModel(id=MODELS[1], adapter_digest=None, base_fingerprint="b" * 64),
        ],
        questions=asked,
        comparisons=comparisons,
        raters=ids,
        assignments=draw_assignments(
            comparisons,
            ids,
            votes_per_item=votes_per_item,
            repeats=repeats,
            controls=0.2 if controls else 0,
            seed=1,
        ),
    )
    StudyFolder(storage, name).write(study, files)
    open_study(engine, storage, name)
    return Voting(engine, storage, study)


def _comparison(
    comparison_id: str, question: Question, kind: str, first: tuple[str | None, str], second: tuple[str | None, str]
) -> Comparison:
    return Comparison.model_validate(
        {
            "id": comparison_id,
            "question": question.id,
            "kind": kind,
            "first": PreparedAnswer(model=first[0], text=first[1]),
            "second": PreparedAnswer(model=second[0], text=second[1]),
            "digest": comparison_id,
        }
    )


def voting_api(database: str, storage: str, **settings: Any) -> FastAPI:
    """The whole application of a server that serves no base: pages, keys, votes."""
    registry = Registry(Storage(storage))
    return create_api(ServedModels(registry, []), {}, ServeSettings(storage=storage, database=database, **settings))


class Rater:
    """Answers over HTTP, with the token of a link."""

    def __init__(self, client: Any, token: str) -> None:
        self._client = client
        self._headers = {"authorization": f"Bearer {token}"}

    def state(self) -> httpx.Response:
        response: httpx.Response = self._client.get("/vote/state", headers=self._headers)
        return response

    def vote(self, comparison: dict[str, Any], outcome: str = "left", **more: Any) -> httpx.Response:
        body = {"assignment": comparison["id"], "round": comparison["round"], "outcome": outcome, **more}
        return self._post("votes", body)

    def withdraw(self, assignment: str) -> httpx.Response:
        return self._post("withdrawals", {"assignment": assignment})

    def reveal(self, assignment: str) -> httpx.Response:
        return self._post("reveals", {"assignment": assignment})

    def vote_all(self, outcome: str = "left") -> list[str]:
        """Vote until there is nothing left; the assignments in their order."""
        done = []
        state = self.state().json()
        while state["comparison"]:
            done.append(state["comparison"]["id"])
            response = self.vote(state["comparison"], outcome)
            assert response.status_code == 200, response.text
            state = response.json()
        return done

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {**self._headers, "content-type": "application/json"}
        response: httpx.Response = self._client.post(f"/vote/{path}", content=json.dumps(body), headers=headers)
        return response
