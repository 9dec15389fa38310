"""`ft serve`: errors are reported before anything starts, and nothing is left behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import httpx
import pytest
import yaml
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import ServeDeploySchema

from ft_service.errors import ClusterError, FtError, ModelError, ServingError, UsageError
from serve.run import _report_waiting, _requests_in_flight, _stop_serving, run_config, run_server
from serve.settings import ServeSettings
from tests.serve.serving_world import World, draft_record, make_world, write_adapter

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch) -> None:
    """Nothing here may get as far as Ray, unless it is given an address."""
    for variable in ("RAY_ADDRESS", "FT_API_KEY", "FT_BASE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    def refuse(**options: object) -> None:
        raise AssertionError(f"Ray was started: {options}")

    monkeypatch.setattr("ray.init", refuse)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def refused(kind: type[FtError], *arguments: object, **options: object) -> str:
    with pytest.raises(kind) as error:
        run_server(*arguments, **options)
    return str(error.value)


def test_a_port_in_use_names_the_fix(world, busy_port):
    message = refused(ServingError, world.storage, None, port=busy_port)
    assert f"port = {busy_port}" in message and "--port" in message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_reachable_address_requires_a_key(world, free_port, host):
    message = refused(ServingError, world.storage, None, host=host, port=free_port)
    assert host in message and "FT_API_KEY" in message


def test_a_missing_storage_is_an_error(tmp_path, free_port):
    assert "storage" in refused(UsageError, str(tmp_path / "typo"), None, port=free_port)


def test_without_adapters_a_base_is_required(tmp_path, free_port):
    message = refused(UsageError, str(tmp_path), None, port=free_port)
    assert "no adapter is published" in message and "--base" in message


def test_adapters_of_two_bases_require_a_choice(tmp_path, free_port):
    world = make_world(tmp_path)
    other = tmp_path / "Other-Llama"
    shutil.copytree(world.base, other)
    write_adapter(other, tmp_path / "other", seed=7)
    world.registry.publish(tmp_path / "other", draft_record(other, "other"), "other-llama", "")
    message = refused(UsageError, world.storage, None, port=free_port)
    assert str(world.base) in message and str(other) in message


@pytest.mark.parametrize("given", [True, False])
def test_the_dtype_is_that_of_the_one_base_named_or_shared(world, free_port, monkeypatch, given):
    started: list[ServeSettings] = []
    monkeypatch.setattr("serve.run._run", lambda settings, *_: started.append(settings))
    run_server(world.storage, str(world.base) if given else None, port=free_port, dtype="float32")
    [base] = started[0].bases
    assert (base.base, base.dtype) == (str(world.base), "float32")
    run_server(world.storage, str(world.base), port=free_port, stop_seconds=0)
    assert (started[0].limits.stop_seconds, started[1].limits.stop_seconds) == (60, 0)
    message = refused(UsageError, world.storage, str(world.base), port=free_port, dtype="int3")
    assert "dtype" in message and "int3" in message


def test_an_incomplete_base_fails_before_ray_starts(world, tmp_path, free_port):
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "half-downloaded" in refused(ModelError, world.storage, str(base), port=free_port)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "applications: [{import_path: 'serve.app:app', args: {bases: [{base: x, gpus: two}]}}]",
            ["bases.0.gpus", "two"],
        ),
        ("applications: [{import_path: 'serve.app:app', args: {nonsense: 1}}]", ["nonsense"]),
        ("applications: [{import_path: 'other:app'}]", ["serve.app:app"]),
        ("applications: [{import_path: 'serve.app:app', deployments: [{name: x}]}]", ["deployments", "replicas"]),
        ("applications: [", ["is not YAML"]),
        ("just text", ["serve/config.yaml"]),
        (None, ["cannot be read"]),
    ],
)
def test_a_config_that_cannot_be_used_is_named_with_its_setting(tmp_path, text, parts):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError) as error:
        run_config(file)
    assert all(part in str(error.value) for part in [str(file), *parts])


def test_the_shipped_config_is_valid_for_ray_serve_and_for_us():
    content = yaml.safe_load((PROJECT / "serve/config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    settings = ServeSettings.model_validate(schema.applications[0].args)
    assert [base.precision for base in settings.bases] == ["auto", "nf4"]


def test_an_unreachable_cluster_is_one_line(world, monkeypatch):
    def no_answer(**options: object) -> None:
        raise ConnectionError(f"Could not connect to {options['address']}\nmore\nlast")

    monkeypatch.setattr("ray.init", no_answer)
    message = refused(ClusterError, world.storage, None, ray_address="192.0.2.1:6379")
    assert "192.0.2.1:6379" in message and "RAY_ADDRESS" in message and "\n" not in message


def test_a_server_that_waits_for_room_says_so_once(monkeypatch, capsys):
    message = "1 replicas that have taken more than 30s to be scheduled"
    application = SimpleNamespace(deployments={"ModelServer": SimpleNamespace(message=message)})
    done = Event()
    looks = iter([{}, {"ft": application}, {"ft": application}])

    def status() -> SimpleNamespace:
        applications = next(looks, None)
        if applications is None:
            done.set()
        return SimpleNamespace(applications=applications or {})

    monkeypatch.setattr("ray.serve.status", status)
    monkeypatch.setattr("serve.run._REPORT_SECONDS", 0)
    _report_waiting("ft", done)
    assert capsys.readouterr().out == f"Waiting: {message}\n"


class RunningServe:
    """The client of a Ray Serve that has applications."""

    http_config = SimpleNamespace(host="127.0.0.1", port=8000)

    def __init__(self, routes: dict[str, str]) -> None:
        self.routes = routes

    def get_serve_details(self) -> dict:
        return {"applications": {name: {"route_prefix": route} for name, route in self.routes.items()}}


@pytest.fixture
def running(monkeypatch):
    """Ray Serve already runs, with these applications; nothing may be deployed, deleted or shut down."""

    def run(**routes: str) -> None:
        monkeypatch.setattr("serve.run.connect", lambda address: None)
        monkeypatch.setattr("serve.run._get_global_client", lambda **_: RunningServe(routes))
        for name in ("start", "run", "delete", "shutdown"):
            monkeypatch.setattr(
                f"ray.serve.{name}", lambda *_, name=name, **__: pytest.fail(f"serve.{name} was called")
            )

    return run


@pytest.mark.parametrize("routes", [{"ft": "/"}, {"default": "/"}, {"ft": "/other"}])
def test_a_second_server_is_refused_and_the_advised_name_is_free(world, running, routes):
    running(**routes)
    message = refused(ServingError, world.storage, None, ray_address="127.0.0.1:1")
    assert "already runs" in message and "--name ft-2" in message and "serve run" not in message


def test_the_advised_name_is_not_one_that_runs(world, running):
    running(**{"ft": "/", "ft-2": "/ft-2"})
    assert "--name ft-3" in refused(ServingError, world.storage, None, ray_address="127.0.0.1:1", name="ft-2")


def test_a_joining_server_must_use_the_address_that_serve_listens_on(world, running):
    running(ft="/")
    message = refused(ServingError, world.storage, None, port=9000, ray_address="127.0.0.1:1", name="other")
    assert "--port 9000" in message and "Use --host 127.0.0.1 --port 8000" in message


@pytest.mark.parametrize("name", ["v1", "a/b", "", "-x"])
def test_a_name_that_would_hide_other_routes_is_refused(world, name):
    assert f"--name = {name!r}" in refused(UsageError, world.storage, None, name=name)


@pytest.mark.parametrize(("left", "shuts_down"), [({"other", "ft-2.tiny-run-0a1b2c3d"}, False), (set(), True)])
def test_a_server_that_stops_takes_its_full_models_along_and_leaves_other_applications_running(
    monkeypatch, left, shuts_down
):
    applications = {"ft", "ft.tiny-run-0a1b2c3d", *left}
    shutdowns = []
    monkeypatch.setattr("serve.run._end_requests", lambda name, stop_seconds: None)
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: applications.remove(name))
    monkeypatch.setattr("ray.serve.shutdown", lambda: shutdowns.append(1))
    _stop_serving("ft", local=False, stop_seconds=1)
    assert applications == left and bool(shutdowns) == shuts_down


def test_with_no_seconds_to_stop_the_application_is_deleted_first_of_all(monkeypatch):
    applications = {"ft", "ft.tiny-run-0a1b2c3d"}
    monkeypatch.setattr("serve.run._end_requests", lambda name, stop_seconds: pytest.fail("it waited for requests"))
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: applications.remove(name))
    monkeypatch.setattr("ray.serve.shutdown", lambda: None)
    _stop_serving("ft", local=False, stop_seconds=0)
    assert applications == set()


def test_a_server_with_a_ray_of_its_own_leaves_the_end_of_serve_to_ray(monkeypatch):
    applications = {"ft"}
    monkeypatch.setattr("serve.run._end_requests", lambda name, stop_seconds: None)
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: applications.remove(name))
    monkeypatch.setattr("ray.serve.shutdown", lambda: pytest.fail("Ray would print that a task failed"))
    _stop_serving("ft", local=True, stop_seconds=1)
    assert applications == set()


@pytest.mark.cluster
def test_it_serves_until_terminated_and_frees_the_port(world, free_port):
    code = f"from serve.run import run_server; run_server({world.storage!r}, None, port={free_port})"
    with tempfile.TemporaryDirectory(prefix="ft-") as ray_folder:
        server = subprocess.Popen(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONPATH": str(PROJECT),
                "RAY_TMPDIR": ray_folder,
                "FT_API_KEY": "a-secret-key",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert server.stdout
            printed = []
            for line in server.stdout:
                printed.append(line)
                if "/models" in line and "curl" in line:
                    break
            headers = {"authorization": "Bearer a-secret-key"}
            models = httpx.get(f"http://127.0.0.1:{free_port}/v1/models", headers=headers).json()["data"]
            server.send_signal(signal.SIGTERM)
            printed += server.stdout.readlines()
            assert server.wait() == 0
        finally:
            server.kill()
    text = "".join(printed)
    assert f"Serving at http://127.0.0.1:{free_port}/v1" in text
    assert all(f"  {model['id']}\n" in text for model in models)
    assert "a-secret-key" not in text
    with socket.create_server(("127.0.0.1", free_port)):
        pass


class Gateways:
    """A handle of two gateways, each with what it answers."""

    app_name = "ft"

    def __init__(self, *answers: object) -> None:
        self.answers = answers

    def broadcast(self, method: str) -> "Gateways":
        return self

    def results(self, **options: object) -> list[object]:
        if not self.answers:
            raise DeploymentUnavailableError(DeploymentID("gateway", "ft"))
        return list(self.answers)


@pytest.mark.parametrize(
    ("running", "answers", "in_flight"),
    [
        (2, (0, 0), 0),
        (2, (3, 1), 4),
        (2, (3, TimeoutError()), 4),
        (2, (3,), 4),
        (2, (), 2),  # a new handle does not know its replicas yet
        (0, (), 0),
    ],
)
def test_a_gateway_that_does_not_answer_counts_as_one_request(monkeypatch, running, answers, in_flight):
    gateway = SimpleNamespace(replica_states={ReplicaState.RUNNING: running})
    applications = {"ft": SimpleNamespace(deployments={"gateway": gateway})}
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications=applications))
    assert _requests_in_flight(Gateways(*answers), "refuse_new") == in_flight


def test_no_request_is_in_flight_on_an_application_that_is_gone(monkeypatch):
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={}))
    assert _requests_in_flight(Gateways(1), "refuse_new") == 0
