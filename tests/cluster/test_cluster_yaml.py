"""cluster.yaml, judged offline by Ray's own code and by what a first user must be able to rely on."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ft_service.catalog.gpus import GPUS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
PLACEHOLDERS = ("ami-00000000000000000", "sg-00000000000000000", "fs-00000000000000000", "us-west-2")


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """What Ray makes of the file: merged with its defaults, which bring an old image and a nightly wheel."""
    config: dict[str, Any] = prepare_config(yaml.safe_load(TEXT))
    return config


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("commands") for command in value]


def test_ray_accepts_the_file(prepared: dict[str, Any]) -> None:
    validate_config(prepared)


def test_ray_image_and_constraints_pin_the_same_version(prepared: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned and pinned[1] == version("ray")
    assert re.fullmatch(rf"rayproject/ray:{re.escape(pinned[1])}-py311-cu\d+", prepared["docker"]["image"])


def test_only_the_pinned_packages_are_installed(prepared: dict[str, Any]) -> None:
    installs = [command for command in commands(prepared) if "pip" in command]
    assert installs
    assert all("--constraint /home/ray/ft-service/constraints.txt" in command for command in installs)
    assert "dev0" not in str(prepared) and "ray-wheels" not in str(prepared)
    assert "/home/ray/ft-service" in prepared["file_mounts"]


def test_no_training_worker_fits_on_the_head(prepared: dict[str, Any]) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert (head["min_workers"], head["max_workers"]) == (0, 0)


def test_the_cluster_starts_without_gpus_and_is_bounded(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"].values()
    assert all(node_type["min_workers"] == 0 for node_type in types)
    assert all(node_type["max_workers"] <= prepared["max_workers"] for node_type in types)
    assert prepared["idle_timeout_minutes"] <= 30
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_every_worker_type_says_what_it_has(prepared: dict[str, Any]) -> None:
    """Left out, Ray asks EC2; left wrong, the autoscaler starts nodes that the job never fits on."""
    workers = {name: it for name, it in prepared["available_node_types"].items() if name != prepared["head_node_type"]}
    assert max(it["resources"]["GPU"] for it in workers.values()) == 8
    for name, it in workers.items():
        (accelerator,) = (key for key in it["resources"] if key.startswith("accelerator_type:"))
        assert accelerator.removeprefix("accelerator_type:") in GPUS, name
        assert it["resources"]["CPU"] >= it["resources"]["GPU"] >= 1, name


def test_every_node_config_fits_ec2s_request_schema(prepared: dict[str, Any]) -> None:
    session = pytest.importorskip("botocore.session").get_session()
    validate = pytest.importorskip("botocore.validate").ParamValidator().validate
    request = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in prepared["available_node_types"].items():
        node_config = node_type["node_config"]
        report = validate({**node_config, "MinCount": 1, "MaxCount": 1}, request)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert node_config["InstanceType"] in request.members["InstanceType"].enum


def test_token_authentication_is_on_wherever_ray_starts(prepared: dict[str, Any]) -> None:
    starts = [command for command in commands(prepared) if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("export RAY_AUTH_MODE=token;") for command in starts)
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert prepared["file_mounts"]["/home/ray/.ray"] == "~/.ray"


def test_the_dashboard_listens_to_its_own_machine_only(prepared: dict[str, Any]) -> None:
    (head_start,) = (command for command in prepared["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in head_start
    assert all(it["node_config"]["SecurityGroupIds"] for it in prepared["available_node_types"].values())


def test_docker_has_shared_memory_for_nccl_and_loaders(prepared: dict[str, Any]) -> None:
    options = " ".join(prepared["docker"]["run_options"])
    assert "--ulimit memlock=-1" in options and "--shm-size=" in options


def test_all_nodes_see_the_storage_of_the_run_specs(prepared: dict[str, Any]) -> None:
    assert any(" /mnt/ft" in command and "mount -t nfs4" in command for command in prepared["initialization_commands"])
    assert "--volume /mnt/ft:/mnt/ft" in prepared["docker"]["run_options"]


def test_mounts_are_folders_because_docker_pins_files(prepared: dict[str, Any]) -> None:
    mounts = [path for pair in prepared["file_mounts"].items() for path in pair]
    assert mounts and not any(Path(path).suffix for path in mounts)


def test_the_file_holds_no_secret() -> None:
    looks_secret = (
        r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|[0-9a-f]{32,}|(password|secret|token|api_key)\s*[:=]\s*\S"
    )
    found = [match[0] for match in re.finditer(looks_secret, TEXT, re.IGNORECASE)]
    assert found == []


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_what_a_user_must_change_is_marked(placeholder: str) -> None:
    """On the line itself, or on the first line of the command it stands in."""
    lines = TEXT.splitlines()
    places = [number for number, line in enumerate(lines) if placeholder in line]
    assert places
    for number in places:
        start = next(first for first in range(number, -1, -1) if re.match(r"\s*(- |[\w-]+:)", lines[first]))
        assert "# <-- yours" in lines[start], lines[number]
