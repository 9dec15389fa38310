"""The whole way on a real server: `ft study create` asks a base and its adapters, a rater votes, results name both."""

import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from ft_service.chat.format import ChatFormat, Message
from ft_service.cli.app import app
from ft_service.storage.storage import Storage
from serve.voting import questions
from serve.voting.files import StudyFolder
from tests.serve.local_server import local_server
from tests.serve.serving_world import make_world
from tests.serve.voting.voting_world import Rater

pytestmark = pytest.mark.slow


def test_a_study_on_a_real_server_from_creation_to_preferences(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    chat = ChatFormat(world.tokenizer)
    asked = ["Tell me: ", "Tell me more: ", "日本の首都は?"]
    documents = [chat.encode([Message("user", text), Message("assistant", "the quick fox")]) for text in asked]
    row = SimpleNamespace(
        input_ids=np.concatenate([np.array(one.input_ids) for one in documents]),
        loss_mask=np.concatenate([np.array(one.loss_mask) for one in documents]),
        document_lengths=np.array([len(one.input_ids) for one in documents]),
    )
    monkeypatch.setattr(
        questions, "open_dataset", lambda storage, digest: SimpleNamespace(validation=[row], digest="d" * 64)
    )
    plan = SimpleNamespace(dataset=SimpleNamespace(digest="d" * 64))
    monkeypatch.setattr(questions, "RunFolder", lambda storage, run: SimpleNamespace(plan=lambda: plan))
    database = f"sqlite:///{tmp_path}/service.db"
    environment = {"FT_DATABASE_URL": database, "FT_STORAGE": world.storage, "COLUMNS": "200", "FT_API_KEY": "a-key"}

    def ft(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["study", *arguments], env=environment, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    first, second = world.adapters
    with (
        local_server(world, database=database, api_key="a-key") as url,
        httpx.Client(base_url=url.removesuffix("/v1")) as client,
    ):
        models = ["--adapters", f"{first.id},{second.id}", "--base", "--questions", "held-out"]
        people = ["--raters", "a,b", "--votes-per-item", "2", "--server", url]
        created = json.loads(
            ft("create", "desk", *models, *people, "--max-tokens", "12", "--controls", "0.2", "--json")
        )
        study, _ = StudyFolder(Storage(world.storage), "desk").read()
        assert [[turn.content for turn in one.turns] for one in study.questions] == [[text.strip()] for text in asked]
        assert [model.adapter_digest for model in study.models] == [first.digest, second.digest, None]
        assert {model.base_fingerprint for model in study.models} == {first.base.fingerprint}
        assert study.models[0].template_digest == first.chat_template_digest
        for link in created["links"].values():
            address, _, token = link.partition("#")
            assert client.get(address).status_code == 200
            Rater(client, token).vote_all("left")
    assert f"{first.id} wins" in ft("results", "desk")
    assert set(json.loads(ft("show", "desk", "--json"))["reviews"]) == {"2"}
    for line in ft("export", "desk", "--to", "preferences").splitlines():
        assert set(json.loads(line)) == {"prompt", "chosen", "rejected"}
