"""The whole service: Ray Serve, a real model, and the stock `openai` client over HTTP."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import openai
import pytest
from ray import serve

from examples.quickstart.quickstart import free_ports
from ft_service.chat.format import ChatFormat, Message
from ft_service.cleanup.removal import delete_adapter
from ft_service.model.base import fingerprint
from serve.app import app, build_app
from serve.settings import BaseSettings, ServeSettings
from tests.cluster.test_dashboards import DASHBOARDS
from tests.hosts import ROOT, wait_for
from tests.prometheus import filled, prometheus
from tests.serve.scripted import DIE, CountingEngine
from tests.serve.serving_world import PROMPT, SENTENCE, World, damage, make_world, publish_adapter
from tests.shared_cluster import joined

pytestmark = pytest.mark.cluster

API_KEY = "a-key-of-this-test"
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def url(world, cluster) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, joined(cluster):
        for name, value in {"FT_API_KEY": API_KEY, "FT_STORAGE": world.storage}.items():
            patch.setenv(name, value)
        (port,) = free_ports(1)
        # All nodes of this cluster have one address, and a port is for one proxy.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        try:
            serve.run(app(ServeSettings()))  # the base is the only one that the adapters name
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            serve.shutdown()


@pytest.fixture(scope="module")
def client(url) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=API_KEY, max_retries=0, timeout=60)


def prompt_ids(world: World) -> list[int]:
    return world.tokenizer(PROMPT)["input_ids"]


def chat_prompt_ids(world: World, text: str) -> list[int]:
    return ChatFormat(world.tokenizer).encode_prompt([Message(role="user", content=text)])


def decode(world: World, ids: list[int]) -> str:
    return world.tokenizer.decode(ids, skip_special_tokens=True).removesuffix("\N{REPLACEMENT CHARACTER}")


def test_base_and_adapters_are_listed_with_parent_and_digest(world, client):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["tiny-llama", *(adapter.id for adapter in world.adapters)]
    assert listed["tiny-llama"].parent is None
    for adapter in world.adapters:
        entry = client.models.retrieve(adapter.id)
        assert (entry.parent, entry.root, entry.digest) == ("tiny-llama", "tiny-llama", adapter.digest)
        assert entry.record["final_loss"] == adapter.final_loss


def test_answers_match_plain_peft_and_name_their_weights(world, client):
    for model, adapter in [("tiny-llama", None), *((adapter.id, adapter) for adapter in world.adapters)]:
        raw = client.completions.with_raw_response.create(
            model=model, prompt=prompt_ids(world), temperature=0, max_tokens=MAX_TOKENS
        )
        answer = raw.parse()
        expected = world.stock_answer(prompt_ids(world), MAX_TOKENS, adapter)
        assert answer.choices[0].text == decode(world, expected)
        assert answer.usage.prompt_tokens == len(prompt_ids(world))
        assert answer.usage.completion_tokens == len(expected)
        digest = adapter.digest if adapter else "none"
        assert raw.headers["x-adapter-digest"] == digest
        assert raw.headers["x-base-fingerprint"] == fingerprint(world.base)
        assert raw.request_id
        assert answer.system_fingerprint == f"base:{fingerprint(world.base)[:8]}-adapter:{digest[:8]}"


def test_chat_answers_match_the_rendered_conversation(world, client):
    adapter = world.adapters[0]
    answer = client.chat.completions.create(
        model=adapter.id, messages=[{"role": "user", "content": "Hi"}], temperature=0, max_tokens=MAX_TOKENS
    )
    ids = chat_prompt_ids(world, "Hi")
    assert answer.choices[0].message.content == decode(world, world.stock_answer(ids, MAX_TOKENS, adapter))
    assert answer.usage.prompt_tokens == len(ids)


def test_a_stream_says_the_same_as_a_whole_answer(world, client):
    request = {
        "model": world.adapters[1].id,
        "messages": [{"role": "user", "content": "こんにちは"}],
        "temperature": 1.2,
        "seed": 3,
        "max_tokens": MAX_TOKENS,
    }
    whole = client.chat.completions.create(**request)
    *events, last = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.prompt_tokens_details.cached_tokens > 0  # the same prompt has been here before


def test_streamed_japanese_and_emoji_are_never_broken(world, client):
    stream = client.completions.create(model="tiny-llama", prompt=PROMPT, temperature=0, max_tokens=500, stream=True)
    pieces = [event.choices[0].text for event in stream]
    assert "".join(pieces) == SENTENCE
    assert not [piece for piece in pieces if "\N{REPLACEMENT CHARACTER}" in piece]


def test_a_real_prometheus_sees_what_the_dashboard_of_the_server_shows(world, client, cluster, tmp_path):
    for model in ("tiny-llama", "tiny-llama", world.adapters[0].id):  # the second one finds its prompt in the cache
        client.completions.create(model=model, prompt=PROMPT * 8, max_tokens=MAX_TOKENS)
    wanted = {
        target["expr"]
        for panel in DASHBOARDS["serving"]["panels"]
        for target in panel["targets"]
        if "preemptions" not in target["expr"]  # a counter that has never counted is not exported
    }
    with prometheus(cluster.sessions / cluster.head.name, tmp_path) as found:

        def has_all() -> bool:
            wanted.difference_update([expression for expression in wanted if found.query(filled(expression))])
            return not wanted

        wait_for(has_all, 120)
        assert found.query("ray_serve_deployment_replica_starts_total")  # FtReplicasEnd counts these


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_a_404_over_http(client, stream):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(
            model="tiny-llama-other-00000000", messages=[{"role": "user", "content": "Hi"}], stream=stream
        )
    assert error.value.code == "model_not_found"


def test_an_adapter_published_now_answers_now(world, client, tmp_path):
    adapter = publish_adapter(world.registry, world.base, tmp_path / "adapter", seed=11)
    answer = client.completions.create(model=adapter.id, prompt=prompt_ids(world), temperature=0, max_tokens=MAX_TOKENS)
    assert answer.choices[0].text == decode(world, world.stock_answer(prompt_ids(world), MAX_TOKENS, adapter))
    assert adapter.id in [model.id for model in client.models.list()]


def test_a_deleted_adapter_is_no_longer_served_and_its_files_wait_for_the_server(world, client, tmp_path):
    adapter = publish_adapter(world.registry, world.base, tmp_path / "adapter", seed=14)
    client.completions.create(model=adapter.id, prompt="x", max_tokens=1)
    deletion = delete_adapter(world.registry.storage, adapter.id)
    assert "may be answering with it" in deletion.kept  # the server has announced its base
    assert adapter.id not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=adapter.id, prompt="x")


def test_the_404_of_an_adapter_names_its_base(world, client, tmp_path):
    other = publish_adapter(world.registry, world.base, tmp_path / "adapter", seed=12, base_fingerprint="cd" * 32)
    assert other.id not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError, match=r"needs the base .* \(cdcdcdcd\)"):
        client.completions.create(model=other.id, prompt="x")


def test_the_error_of_a_damaged_adapter_names_the_file(world, client, tmp_path):
    adapter = publish_adapter(world.registry, world.base, tmp_path / "adapter", seed=13)
    damage(world.registry, adapter)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match=r"adapter_model\.safetensors"):
            client.completions.create(model=adapter.id, prompt="x", stream=stream)


def test_every_route_except_health_requires_the_key(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "models": ["tiny-llama"]}
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
    assert httpx.post(f"{url}/chat/completions", json={}).status_code == 401


@pytest.fixture(scope="module")
def counting(url, world) -> str:
    base = BaseSettings(base=str(world.base), name="counting", cpus=0)  # leaves room for another server
    settings = ServeSettings(storage=world.storage, bases=(base,), api_key=None)
    serve.run(build_app(settings, CountingEngine), name="counting", route_prefix="/counting")
    return url.replace("/v1", "/counting/v1")


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_stops_its_answer(counting, stream):
    body = {"model": "counting", "prompt": [5, 1], "max_tokens": 2000, "stream": stream}
    headers = {"authorization": f"Bearer {API_KEY}"}
    if stream:
        with httpx.stream("POST", f"{counting}/completions", json=body, headers=headers) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{counting}/completions", json=body, headers=headers, timeout=1)
    wait_for(lambda: running(counting, headers) == 0, 30)


def running(url: str, headers: dict[str, str]) -> int:
    return httpx.get(f"{url}/stats", headers=headers).json()["counting"][0]["running"]


def test_a_request_whose_replica_dies_before_it_answers_is_asked_again(counting, tmp_path):
    body = {"model": "counting", "prompt": [DIE, 1], "max_tokens": 3, "user": str(tmp_path)}
    headers = {"authorization": f"Bearer {API_KEY}"}
    reply = httpx.post(f"{counting}/completions", json=body, headers=headers, timeout=120)
    # The second replica dies of it as well: two are asked, and no more.
    assert reply.status_code == 500 and "has died" in reply.json()["error"]["message"]
    body = {"model": "counting", "prompt": [5, 1], "max_tokens": 3}
    reply = httpx.post(f"{counting}/completions", json=body, headers=headers, timeout=120)
    assert reply.json()["choices"][0]["text"] == "0 1 2 "


def test_a_second_server_joins_at_its_own_route_and_leaves_the_first_one_running(world, client, cluster, url):
    port = httpx.URL(url).port
    running = set(serve.status().applications)
    headers = {"authorization": f"Bearer {API_KEY}"}

    def second(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ft_service.cli.app", "serve", "--port", str(port), *options]
        environment = {**cluster.environment, "FT_API_KEY": API_KEY, "FT_STORAGE": world.storage}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    refused, _ = (server := second()).communicate()
    assert server.returncode == 1 and "--name ft-2" in refused
    server = second("--name", "ft-2")
    try:
        assert server.stdout
        printed = []
        for line in server.stdout:
            printed.append(line)
            if "/models" in line and "curl" in line:
                break
        assert f"Serving at http://127.0.0.1:{port}/ft-2/v1\n" in printed, "".join(printed)
        models = httpx.get(f"http://127.0.0.1:{port}/ft-2/v1/models", headers=headers).json()["data"]
        server.send_signal(signal.SIGTERM)
        server.communicate()
    finally:
        server.kill()
    assert server.returncode == 0
    assert [model["id"] for model in models] == [model.id for model in client.models.list()]
    assert set(serve.status().applications) == running
