"""A server's life: replicas die, are replaced, come and go; adapters too. Real Ray Serve, an engine that counts."""

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from examples.quickstart.quickstart import free_ports
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from serve.app import build_app
from serve.database.audit import audit_log
from serve.database.database import open_database
from serve.database.keys import create_key
from serve.run import LOGGING
from serve.settings import Autoscaling, BaseSettings, Limits, ServeSettings
from tests.hosts import Cluster, wait_for
from tests.serve.scripted import HELD, LATE, WHO, CountingEngine, hold, release
from tests.serve.serving_world import publish_adapter
from tests.serve.voting.voting_world import Rater, make_study
from tests.shared_cluster import joined
from tests.worlds import SMALL, write_base

pytestmark = pytest.mark.cluster

APP = "life"
BATCH = 4
QUEUE = 6
SECONDS = 90


@dataclass
class Server:
    url: str
    registry: Registry
    base: Path
    settings: ServeSettings
    admin: str
    user: str
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(64))

    def ask(self, prompt: list[int], model: str = "pair", max_tokens: int = 1, **headers: str) -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
        return httpx.post(f"{self.url}/completions", json=body, headers=self.headers(**headers), timeout=SECONDS)

    def start(self, prompt: list[int], model: str = "pair", max_tokens: int = 1) -> Future[httpx.Response]:
        return self.threads.submit(self.ask, prompt, model, max_tokens)

    def headers(self, **more: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.user}", **{name.replace("_", "-"): text for name, text in more.items()}}

    def stats(self, base: str = "pair") -> list[dict]:
        return httpx.get(f"{self.url}/stats", headers=self.headers(), timeout=SECONDS).json()[base]

    def publish(self, folder: Path, seed: int) -> AdapterRecord:
        return publish_adapter(self.registry, self.base, folder / f"adapter-{seed}", seed)


@dataclass
class Stream:
    """A streamed answer that is read in the background; held after its first token."""

    server: Server
    model: str = "pair"
    pid: int = 0
    has_begun: threading.Event = field(default_factory=threading.Event)
    lines: list[str] = field(default_factory=list)
    done: Future[None] = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.server.threads.submit(self._read)

    def _read(self) -> None:
        body = {"model": self.model, "prompt": [HELD, 1], "max_tokens": 20, "stream": True}
        url = f"{self.server.url}/completions"
        with httpx.stream("POST", url, json=body, headers=self.server.headers(), timeout=SECONDS) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.lines.append(line.removeprefix("data: "))
                    if not self.pid and (choices := json.loads(self.lines[0]).get("choices")):
                        self.pid = int(choices[0]["text"])
                    self.has_begun.set()


def text(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def pid(reply: httpx.Response) -> int:
    return int(text(reply).split()[0])


@pytest.fixture(scope="module")
def server(tmp_path_factory, cluster) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("life")
    base = folder / "tiny"
    write_base(base, ["the quick brown fox"], 280, SMALL)
    storage = Storage(str(folder / "storage"))
    Path(storage.root).mkdir()
    database = f"sqlite:///{folder}/service.db"
    keys = open_database(database)
    admin, _ = create_key(keys, "boss", is_admin=True)
    user, _ = create_key(keys, "user")
    small = {"base": str(base), "cpus": 0, "gpus": 0}
    scaling = Autoscaling(min_replicas=0, max_replicas=1, downscale_delay_seconds=0)
    settings = ServeSettings(
        storage=storage.root,
        bases=(
            BaseSettings(name="pair", replicas=2, max_batch=BATCH, **small),
            BaseSettings(name="rare", autoscaling=scaling, max_batch=1, **small),
        ),
        database=database,
        api_key=None,
        limits=Limits(max_queue=QUEUE),
    )
    (port,) = free_ports(1)
    with joined(cluster):
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        found = Server(f"http://127.0.0.1:{port}/v1", Registry(storage), base, settings, admin, user)
        try:
            deploy(settings)
            yield found
        finally:
            found.threads.shutdown(wait=False, cancel_futures=True)
            serve.shutdown()


def deploy(settings: ServeSettings) -> None:
    serve.run(build_app(settings, CountingEngine), name=APP, route_prefix="/", logging_config=LOGGING)


@pytest.fixture(autouse=True)
def held(server) -> None:
    hold(server.base)


def begun(stream: Stream) -> Stream:
    assert stream.has_begun.wait(SECONDS)
    return stream


def ended(stream: Stream) -> bool:
    """Whether it had a complete answer."""
    stream.done.result(SECONDS)
    return stream.lines[-1] == "[DONE]"


def all_of(server: Server, is_so: Callable[[list[dict]], bool]) -> None:
    """Wait until both replicas answer, and what they report is as it should be."""
    wait_for(lambda: len(found := server.stats()) == 2 and is_so(found), SECONDS)


def test_a_server_is_ready_while_a_base_that_may_scale_to_zero_has_no_replica(server):
    assert server.stats("rare") == []
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 200, SECONDS)
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}


def test_a_base_without_replicas_starts_one_when_it_is_asked(server):
    assert pid(server.ask([WHO, 1], "rare")) > 0


def test_a_full_queue_is_a_429_that_names_when_to_come_back(server):
    stream = begun(Stream(server, "rare"))
    asked = [server.start([WHO, 1], "rare") for _ in range(3 * QUEUE)]
    wait_for(lambda: sum(one.done() for one in asked) >= 2 * QUEUE, SECONDS)
    refused = [one.result() for one in asked if one.done()]
    assert {reply.status_code for reply in refused} == {429}
    assert {reply.json()["error"]["code"] for reply in refused} == {"overloaded"}
    assert all(int(reply.headers["retry-after"]) > 0 for reply in refused)
    release(server.base)
    accepted = [one.result() for one in asked if one.result() not in refused]
    assert accepted and all(text(reply) for reply in accepted)
    assert ended(stream)


def test_the_requests_of_an_adapter_meet_on_one_replica_until_that_is_busy(server, tmp_path):
    all_of(server, lambda found: True)
    adapters = [server.publish(tmp_path, seed) for seed in (1, 2)]
    for adapter in adapters:
        assert len({pid(server.ask([WHO, 1], adapter.id)) for _ in range(4)}) == 1
    loaded = sorted(digest for replica in server.stats() for digest in replica["loaded_adapters"])
    assert loaded == sorted(adapter.digest for adapter in adapters)
    replies = [server.start([LATE, 1], adapters[0].id) for _ in range(BATCH)]
    all_of(server, lambda found: sum(replica["running"] for replica in found) == BATCH)
    release(server.base)
    assert len({pid(reply.result()) for reply in replies}) == 2


def test_a_published_adapter_answers_on_every_replica(server, tmp_path):
    adapter = server.publish(tmp_path, 3)
    replies = [server.start([LATE, 1], adapter.id) for _ in range(BATCH)]
    all_of(server, lambda found: all(adapter.digest in replica["loaded_adapters"] for replica in found))
    release(server.base)
    assert len({pid(reply.result()) for reply in replies}) == 2


def test_deleting_a_model_hides_it_lets_answers_end_and_unloads_it_everywhere(server, tmp_path):
    adapter = server.publish(tmp_path, 4)
    begun_streams = [begun(Stream(server, adapter.id)) for _ in range(BATCH)]
    assert len({stream.pid for stream in begun_streams}) == 2
    url = f"{server.url}/models/{adapter.id}"
    assert httpx.delete(url, headers=server.headers()).status_code == 403
    reply = httpx.delete(url, headers={"authorization": f"Bearer {server.admin}"}, timeout=SECONDS)
    assert reply.json() == {"id": adapter.id, "object": "model", "deleted": True}
    assert server.ask([WHO, 1], adapter.id).json()["error"]["code"] == "model_not_found"
    assert adapter.id not in httpx.get(f"{server.url}/models", headers=server.headers()).text
    all_of(server, lambda found: all(adapter.digest in replica["loaded_adapters"] for replica in found))
    release(server.base)
    assert all(ended(stream) for stream in begun_streams)
    all_of(server, lambda found: not any(adapter.digest in replica["loaded_adapters"] for replica in found))
    entries = [(entry.key, entry.action, entry.target) for entry in audit_log(open_database(server.settings.database))]
    assert entries[-1] == ("boss", "models.delete", adapter.id)


def test_a_killed_replica_costs_only_the_streams_that_it_had_begun(server):
    all_of(server, lambda found: all(replica["running"] == 0 for replica in found))
    streams = [begun(Stream(server)) for _ in range(4)]
    late = [server.start([LATE, 1]) for _ in range(2 * BATCH - 4)]
    all_of(server, lambda found: sum(replica["running"] for replica in found) == 2 * BATCH)
    queued = [server.start([WHO, 1]) for _ in range(2)]
    victim = streams[0].pid
    cut = [stream for stream in streams if stream.pid == victim]
    spared = [stream for stream in streams if stream.pid != victim]
    assert cut and spared
    os.kill(victim, signal.SIGKILL)
    for stream in cut:
        stream.done.result(SECONDS)
        assert "has died" in json.loads(stream.lines[-1])["error"]["message"]
    release(server.base)
    answered = [server.ask([WHO, 1]) for _ in range(3)]
    for reply in [*answered, *(one.result() for one in [*late, *queued])]:
        assert pid(reply) != victim
    assert all(ended(stream) for stream in spared)


def test_new_requests_do_not_wait_for_the_replacement_of_one_of_two_replicas(server):
    all_of(server, lambda found: all(replica["running"] == 0 for replica in found))
    streams = [begun(Stream(server)) for _ in range(2)]
    victim, other = (stream.pid for stream in streams)
    assert victim != other
    os.kill(victim, signal.SIGKILL)
    # The other one answers all of them: a replacement takes seconds to start.
    assert {pid(server.ask([WHO, 1])) for _ in range(3)} == {other}
    release(server.base)
    assert not ended(streams[0]) and ended(streams[1])


def test_requests_wait_for_the_replacement_of_an_only_replica_that_dies(server):
    stream = begun(Stream(server, "rare"))
    waiting = [server.start([WHO, 1], "rare") for _ in range(3)]
    os.kill(stream.pid, signal.SIGKILL)
    asked_later = [server.start([WHO, 1], "rare") for _ in range(2)]
    stream.done.result(SECONDS)
    assert "has died" in json.loads(stream.lines[-1])["error"]["message"]
    for one in [*waiting, *asked_later]:
        assert pid(one.result(SECONDS)) != stream.pid


def test_a_rolling_update_costs_no_request(server):
    all_of(server, lambda found: True)
    stream = begun(Stream(server))
    before = {pid(server.ask([WHO, 1])) for _ in range(4)}
    is_done = threading.Event()

    def ask_again_and_again() -> list[httpx.Response]:
        replies = []
        while not is_done.is_set():
            replies.append(server.ask([WHO, 20], max_tokens=3))
        return replies

    askers = [server.threads.submit(ask_again_and_again) for _ in range(2)]
    pair, rare = server.settings.bases
    server.settings = server.settings.model_copy(
        update={"bases": (pair.model_copy(update={"adapter_gib": 2.0}), rare), "log_prompts": True}
    )
    try:
        deploying = server.threads.submit(deploy, server.settings)
        wait_for(lambda: pid(server.ask([WHO, 1])) not in before, 2 * SECONDS)
        release(server.base)
        deploying.result(3 * SECONDS)
    finally:
        is_done.set()
    replies = [reply for asker in askers for reply in asker.result()]
    assert all(text(reply) for reply in replies)
    assert ended(stream)


def test_one_request_id_leads_from_the_client_through_both_logs(server, cluster):
    reply = server.ask([WHO, 1], max_tokens=3, x_request_id="the-id-of-a-client")
    assert reply.headers["x-request-id"] == "the-id-of-a-client"
    wait_for(lambda: len(lines_about("the-id-of-a-client", cluster)) == 2, SECONDS)
    found = lines_about("the-id-of-a-client", cluster)
    gateway = next(fields for fields in found if "status" in fields)
    engine = next(fields for fields in found if "adapter" in fields)
    assert (gateway["status"], gateway["model"], gateway["key"], gateway["outcome"]) == (200, "pair", "user", "ok")
    assert engine["outcome"] == "ok"
    assert gateway["generated_tokens"] == engine["generated_tokens"] == 3


def lines_about(request_id: str, cluster: Cluster) -> list[dict]:
    """Our own fields of all lines in the log files of replicas, where they are about this request."""
    found = []
    for file in cluster.sessions.rglob("logs/serve/replica_*.log"):
        lines = file.read_text(errors="replace").splitlines()
        for line in (line for line in lines if line.startswith("{")):  # other servers of the cluster log text
            fields = json.loads(line).get("ft") or {}
            if fields.get("request") == request_id:
                found.append(fields)
    return found


def test_metrics_are_exported_per_base_model_and_replica(server, tmp_path):
    adapter = server.publish(tmp_path, 5)
    text(server.ask([WHO, 1], adapter.id, 3))
    wanted = {
        f'ray_ft_serve_requests_total{{base="pair",model="{adapter.id}",outcome="ok"}}',
        f'ray_ft_serve_generated_tokens_total{{base="pair",model="{adapter.id}"}}',
        f'ray_ft_serve_time_to_first_token_seconds_count{{base="pair",model="{adapter.id}"}}',
        f'ray_ft_serve_time_per_output_token_seconds_count{{base="pair",model="{adapter.id}"}}',
        'ray_ft_serve_requests_in_flight{base="pair"}',
        'ray_ft_engine_running{base="pair",replica="*"}',
        'ray_ft_engine_adapters_loaded{base="pair",replica="*"}',
        'ray_ft_engine_adapter_loads_total{base="pair",replica="*"}',
    }
    wait_for(lambda: wanted <= exported(), SECONDS)


def exported() -> set[str]:
    """Names and labels of our metrics on all nodes; a replica's id is *."""
    found = set()
    for node in ray.nodes():
        try:
            page = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", trust_env=False).text
        except httpx.TransportError:  # Ray's agent on that node has not begun to listen
            continue
        for name, labels in re.findall(r"^(ray_ft_\w+)\{(.*)\} ", page, re.MULTILINE):
            ours = sorted(re.findall(r'(base|model|outcome|replica)="([^"]*)"', labels))
            shown = ",".join(f'{label}="{"*" if label == "replica" else value}"' for label, value in ours)
            found.add(f"{name}{{{shown}}}")
    return found


def test_a_base_that_nobody_asks_scales_to_zero(server):
    def replicas() -> int:  # of the controller: asking the replicas themselves would keep them busy
        return serve.status().applications[APP].deployments["rare"].replica_states.get("RUNNING", 0)

    wait_for(lambda: replicas() == 0, SECONDS)
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_people_vote_through_the_gateway_without_an_api_key(server):
    assert server.settings.database and server.settings.storage
    study = make_study(open_database(server.settings.database), server.settings.storage, questions=2)
    with httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=SECONDS) as client:
        page = client.get("/vote")
        assert page.status_code == 200 and "content-security-policy" in page.headers
        assert client.get("/vote/state").json()["error"]["code"] == "invalid_link"
        done = Rater(client, study.token("anna")).vote_all("tie")
    assert len(done) == 2
    assert [vote.outcome for vote in study.folder.votes_of("desk-r0")[0]] == ["tie", "tie"]
