"""cluster.yaml and its variants, judged offline: by Ray, by the schemas of EC2 and Compute Engine, and by own rules."""

import json
import re
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ft_service.catalog.gpus import GPUS
from ft_service.spec.load import load_run_spec
from serve.transport import RAY_SETTINGS

ROOT = Path(__file__).resolve().parents[2]
AWS = "cluster.yaml"
GCP = "deploy/gcp/cluster.yaml"
LOCAL = "deploy/local/cluster.yaml"
FILES = (AWS, GCP, LOCAL)
WITH_NODE_TYPES = (AWS, GCP)
PLACEHOLDERS = {
    AWS: (
        "ami-00000000000000000",
        "sg-00000000000000000",
        "fs-00000000000000000",
        "subnet-00000000000000000",
        "us-west-2",
        "example.com",
    ),
    GCP: ("your-project", "us-central1", "example.com", "example.internal"),
    LOCAL: ("10.0.0.1", "10.0.0.2", "id_ed25519"),
}
TORCH_WHEELS_CUDA = "13.0"
"""CUDA of the wheels of torch 2.13.0 on the Python package index."""

EC2_NETWORK_CARDS = {"p4de.24xlarge": 4, "p5.48xlarge": 32, "p5en.48xlarge": 16}
"""As in AWS's list of accelerated instance types for EFA."""

GCP_NETWORK_CARDS = {"a3-highgpu-8g": 5}
"""As in Google's list of GPU machine types: one for the host, one for each pair of GPUs."""


def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def prepared() -> Callable[[str], dict[str, Any]]:
    """What Ray makes of a file: merged with its defaults, which bring an old image and a nightly wheel."""
    configs: dict[str, dict[str, Any]] = {}

    def of(file: str) -> dict[str, Any]:
        if file not in configs:
            configs[file] = prepare_config(yaml.safe_load(text_of(file)))
        return configs[file]

    return of


Prepared = Callable[[str], dict[str, Any]]


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("commands") for command in value]


def worker_types(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: it for name, it in config["available_node_types"].items() if name != config["head_node_type"]}


def gpu_of(node_type: dict[str, Any]) -> str | None:
    """Ray's name of its GPU; None for a type without."""
    found = [key for key in node_type["resources"] if key.startswith("accelerator_type:")]
    return found[0].removeprefix("accelerator_type:") if found else None


@pytest.mark.parametrize("file", FILES)
def test_ray_accepts_the_file(prepared: Prepared, file: str) -> None:
    validate_config(prepared(file))


@pytest.mark.parametrize("file", FILES)
def test_ray_image_and_constraints_pin_the_same_version(prepared: Prepared, file: str) -> None:
    pinned = re.search(r"^ray==(\S+)$", text_of("constraints.txt"), re.MULTILINE)
    assert pinned and pinned[1] == version("ray")
    assert re.fullmatch(rf"rayproject/ray:{re.escape(pinned[1])}-py311-cu\d+", prepared(file)["docker"]["image"])


@pytest.mark.parametrize("file", FILES)
def test_cuda_of_the_image_is_that_of_the_wheels(prepared: Prepared, file: str) -> None:
    """DeepSpeed refuses to compile an operator when nvcc and torch have different major versions of CUDA."""
    assert torch.version.cuda in (None, TORCH_WHEELS_CUDA)
    assert re.search(r"^torch==2\.13\.0$", text_of("constraints.txt"), re.MULTILINE)
    assert prepared(file)["docker"]["image"].endswith(f"-cu{TORCH_WHEELS_CUDA.replace('.', '')}")


@pytest.mark.parametrize("file", FILES)
def test_only_the_pinned_packages_are_installed(prepared: Prepared, file: str) -> None:
    config = prepared(file)
    installs = [command for command in commands(config) if "pip" in command]
    assert installs
    assert all("--constraint /home/ray/ft-service/constraints.txt" in command for command in installs)
    assert "/home/ray/ft-service" in config["file_mounts"]
    assert any("FT_CONSTRAINTS=/home/ray/ft-service/constraints.txt" in it for it in config["docker"]["run_options"])


@pytest.mark.parametrize("file", FILES)
def test_nothing_of_rays_old_defaults_is_left(prepared: Prepared, file: str) -> None:
    merged = str(prepared(file))
    for leftover in ("dev0", "ray-wheels", "ray_head_default", "ray_worker_small", "deeplearning-platform-release"):
        assert leftover not in merged
    assert "latest" not in prepared(file)["docker"]["image"]


@pytest.mark.parametrize("file", WITH_NODE_TYPES)
def test_no_training_worker_fits_on_the_head(prepared: Prepared, file: str) -> None:
    config = prepared(file)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert (head["min_workers"], head["max_workers"]) == (0, 0)


def test_the_head_of_own_machines_offers_nothing(prepared: Prepared) -> None:
    """Ray finds the resources of a machine itself unless `ray start` sets them."""
    (start,) = (command for command in prepared(LOCAL)["head_start_ray_commands"] if "ray start" in command)
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(shlex.split(start))


@pytest.mark.parametrize("file", WITH_NODE_TYPES)
def test_the_cluster_starts_without_gpus_and_is_bounded(prepared: Prepared, file: str) -> None:
    config = prepared(file)
    types = config["available_node_types"].values()
    assert sum(node_type["min_workers"] for node_type in types) == 0
    assert all(node_type["max_workers"] <= config["max_workers"] for node_type in types)
    assert config["idle_timeout_minutes"] <= 30


def test_ended_nodes_are_terminated(prepared: Prepared) -> None:
    assert prepared(AWS)["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("file", WITH_NODE_TYPES)
def test_nodes_have_private_addresses_only(prepared: Prepared, file: str) -> None:
    config = prepared(file)
    assert config["provider"]["use_internal_ips"] is True
    assert "AssociatePublicIpAddress" not in text_of(file) and "accessConfigs" not in text_of(file)


@pytest.mark.parametrize("file", WITH_NODE_TYPES)
def test_every_worker_type_says_what_it_has(prepared: Prepared, file: str) -> None:
    """Left out, Ray asks the cloud; left wrong, the autoscaler starts nodes that the job never fits on."""
    workers = worker_types(prepared(file))
    assert max(it["resources"].get("GPU", 0) for it in workers.values()) == 8
    assert [name for name, it in workers.items() if "GPU" not in it["resources"]] == ["cpu"]
    for name, it in workers.items():
        if "GPU" in it["resources"]:
            assert gpu_of(it) in GPUS, name
            assert it["resources"]["CPU"] >= it["resources"]["GPU"] >= 1, name


@pytest.mark.parametrize("file", WITH_NODE_TYPES)
def test_spot_types_are_off_and_twins_of_another(prepared: Prepared, file: str) -> None:
    """With both on, Ray would choose between two types that it cannot tell apart."""
    workers = worker_types(prepared(file))
    spots = [name for name in workers if name.endswith("-spot")]
    assert spots
    for name in spots:
        twin = workers[name.removesuffix("-spot")]
        assert workers[name]["resources"] == twin["resources"] and workers[name]["max_workers"] == 0
        assert "spot" in json.dumps(workers[name]["node_config"]).lower()
    shapes = [json.dumps(it["resources"], sort_keys=True) for it in workers.values() if it["max_workers"]]
    assert len(shapes) == len(set(shapes))


def needs_of(spec: Path) -> tuple[int, int]:
    """(GPUs, GB of each) of a shipped spec, from the second line of its comment."""
    found = re.search(r"^# Needs (\d+) GPUs? of (\d+) GB or more", spec.read_text(encoding="utf-8"), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def fits(node_type: dict[str, Any], gpus: int, gigabytes: int) -> bool:
    gpu = gpu_of(node_type)
    if gpus == 0 or gpu is None:
        return gpus == 0 and gpu is None
    capacity = node_type["max_workers"] * node_type["resources"]["GPU"]
    return capacity >= gpus and GPUS[gpu].memory_gib * 2**30 / 1e9 >= gigabytes * 0.98


@pytest.mark.parametrize("file", WITH_NODE_TYPES)
def test_every_worker_type_is_of_use_for_a_shipped_spec(prepared: Prepared, file: str) -> None:
    specs = sorted((ROOT / "jobs/specs").glob("*.yaml"))
    for name, it in worker_types(prepared(file)).items():
        allowed = {**it, "max_workers": max(1, it["max_workers"])}
        assert any(fits(allowed, *needs_of(spec)) for spec in specs), name


@pytest.mark.parametrize("spec", sorted((ROOT / "jobs/specs").glob("*.yaml")), ids=lambda spec: spec.stem)
def test_every_shipped_spec_fits_on_the_cluster_at_its_largest(prepared: Prepared, spec: Path) -> None:
    workers = worker_types(prepared(AWS))
    gpu = load_run_spec(spec).parallel.accelerator_type
    chosen = [it for it in workers.values() if it["max_workers"] and (gpu is None or gpu_of(it) == gpu)]
    assert any(fits(it, *needs_of(spec)) for it in chosen)


def test_every_node_config_fits_ec2s_request_schema(prepared: Prepared) -> None:
    session = pytest.importorskip("botocore.session").get_session()
    validate = pytest.importorskip("botocore.validate").ParamValidator().validate
    request = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    interface = request.members["NetworkInterfaces"].member
    for name, node_type in prepared(AWS)["available_node_types"].items():
        node_config = dict(node_type["node_config"])
        for subnet in node_config.pop("SubnetIds", []):  # Ray's own key: it tries one after the other
            node_config["SubnetId"] = subnet
        report = validate({**node_config, "MinCount": 1, "MaxCount": 1}, request)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        unknown = set().union(*(set(it) - set(interface.members) for it in node_config.get("NetworkInterfaces", [])))
        assert not set(node_config) - set(request.members) and not unknown, name
        assert node_config["InstanceType"] in request.members["InstanceType"].enum


def test_nodes_with_efa_name_every_network_card_once(prepared: Prepared) -> None:
    """Ray rejects subnets and groups beside NetworkInterfaces; EC2 rejects two interfaces on one place of a card."""
    for name, node_type in worker_types(prepared(AWS)).items():
        config = node_type["node_config"]
        if node_type["resources"].get("GPU", 0) < 8:
            assert "NetworkInterfaces" not in config and config["SubnetIds"] and config["SecurityGroupIds"], name
            continue
        interfaces = config["NetworkInterfaces"]
        assert not {"SubnetId", "SubnetIds", "SecurityGroupIds"} & set(config)
        cards = EC2_NETWORK_CARDS[config["InstanceType"]]
        assert [it["NetworkCardIndex"] for it in interfaces] == list(range(cards)), name
        assert [it["DeviceIndex"] for it in interfaces] == [0] + [1] * (cards - 1)
        assert "InterfaceType" not in interfaces[0]
        assert all(it["InterfaceType"] == "efa-only" for it in interfaces[1:])
        assert all(it["SubnetId"] and it["Groups"] for it in interfaces)
        assert config["Placement"]["GroupName"]
        assert "--device=/dev/infiniband" in node_type["docker"]["worker_run_options"]


def check_discovery(value: object, schema: dict[str, Any], schemas: dict[str, Any], where: str) -> list[str]:
    """What in `value` Google's discovery schema does not know: names, types and enumerated values."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    if schema.get("type") == "object":
        if not isinstance(value, dict):
            return [f"{where}: not an object"]
        known = schema.get("properties", {})
        other = schema.get("additionalProperties")
        found = [] if other else [f"{where}.{key}: unknown" for key in value if key not in known]
        for key, item in value.items():
            if its := known.get(key, other):
                found += check_discovery(item, its, schemas, f"{where}.{key}")
        return found
    if schema.get("type") == "array":
        if not isinstance(value, list):
            return [f"{where}: not a list"]
        return [problem for item in value for problem in check_discovery(item, schema["items"], schemas, where)]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value} is none of {schema['enum']}"]
    is_number = schema.get("type") == "integer" or schema.get("format") in ("int64", "uint64")
    expected = {"boolean": bool, "string": (str, int) if is_number else str, "integer": int}[schema["type"]]
    return [] if isinstance(value, expected) else [f"{where}: {value!r} is no {schema['type']}"]


def test_every_node_config_fits_compute_engines_schema(prepared: Prepared) -> None:
    discovery = pytest.importorskip("googleapiclient.discovery_cache")
    document = json.loads((Path(discovery.__file__).parent / "documents/compute.v1.json").read_text())
    for name, node_type in prepared(GCP)["available_node_types"].items():
        found = check_discovery(node_type["node_config"], {"$ref": "Instance"}, document["schemas"], name)
        assert found == []
    wrong = {"machineTyp": "n2", "scheduling": {"provisioningModel": "CHEAP"}, "disks": [{"boot": "yes"}]}
    assert len(check_discovery(wrong, {"$ref": "Instance"}, document["schemas"], "wrong")) == 3


def test_nodes_of_a_compact_placement_have_a_network_for_each_card(prepared: Prepared) -> None:
    """Google accepts each network once per machine, and a placement of its own region only."""
    workers = worker_types(prepared(GCP))
    compact = workers["gpu-8x-h100-compact"]
    assert compact["resources"] == workers["gpu-8x-h100"]["resources"] and compact["max_workers"] == 0
    config = compact["node_config"]
    assert config["machineType"] == workers["gpu-8x-h100"]["node_config"]["machineType"]
    networks = [it["subnetwork"] for it in config["networkInterfaces"]]
    assert len(set(networks)) == GCP_NETWORK_CARDS[config["machineType"]] == len(networks)
    assert {it["nicType"] for it in config["networkInterfaces"]} == {"GVNIC"}
    (policy,) = config["resourcePolicies"]
    region = f"/regions/{prepared(GCP)['provider']['region']}/"
    assert all(region in place for place in (policy, *networks))
    assert config["scheduling"]["onHostMaintenance"] == "TERMINATE"  # which a compact placement requires


@pytest.mark.parametrize("file", FILES)
def test_token_authentication_is_on_wherever_ray_starts(prepared: Prepared, file: str) -> None:
    config = prepared(file)
    starts = [command for command in commands(config) if "ray start" in command]
    assert len(starts) == 2
    assert all(command.startswith("export RAY_AUTH_MODE=token;") for command in starts)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray"] == "~/.ray"


@pytest.mark.parametrize("file", FILES)
def test_ray_starts_with_the_settings_of_ft_serve(prepared: Prepared, file: str) -> None:
    variables = [option.removeprefix("--env ") for option in prepared(file)["docker"]["run_options"]]
    found = dict(variable.split("=", 1) for variable in variables if variable.startswith("RAY_SERVE_"))
    assert found == RAY_SETTINGS


@pytest.mark.parametrize(("file", "cloud"), [(AWS, "aws"), (GCP, "gcp")])
def test_every_worker_watches_for_the_clouds_notice(prepared: Prepared, file: str, cloud: str) -> None:
    config = prepared(file)
    (watcher,) = (command for command in config["worker_start_ray_commands"] if "cluster.spot" in command)
    assert watcher.startswith("export RAY_AUTH_MODE=token;")
    assert f"python -m ft_service.cluster.spot --cloud {cloud} --address $RAY_HEAD_IP:6379" in watcher
    assert watcher.endswith("</dev/null &)")  # otherwise SSH waits for it


@pytest.mark.parametrize("file", FILES)
def test_the_dashboard_listens_to_its_own_machine_only(prepared: Prepared, file: str) -> None:
    (head_start,) = (command for command in prepared(file)["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in head_start


@pytest.mark.parametrize("file", FILES)
def test_docker_has_shared_memory_for_nccl_and_loaders(prepared: Prepared, file: str) -> None:
    options = " ".join(prepared(file)["docker"]["run_options"])
    assert "--ulimit memlock=-1" in options and "--shm-size=" in options


@pytest.mark.parametrize("file", FILES)
def test_all_nodes_see_the_storage_of_the_run_specs(prepared: Prepared, file: str) -> None:
    config = prepared(file)
    assert any("mountpoint -q /mnt/ft" in command for command in config["initialization_commands"])
    if file != LOCAL:
        assert any(" /mnt/ft" in it and "mount -t nfs4" in it for it in config["initialization_commands"])
    assert "--volume /mnt/ft:/mnt/ft" in config["docker"]["run_options"]


@pytest.mark.parametrize("file", FILES)
def test_mounts_are_folders_because_docker_pins_files(prepared: Prepared, file: str) -> None:
    mounts = [path for pair in prepared(file)["file_mounts"].items() for path in pair]
    assert mounts and not any(Path(path).suffix for path in mounts)


@pytest.mark.parametrize("file", [AWS, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "deploy").rglob("*.*"))])
def test_no_file_holds_a_secret(file: str) -> None:
    looks_secret = (
        r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|-----BEGIN|[0-9a-f]{32,}|"
        r"(password|secret|(?<!account)token|api_key)\s*[:=]\s*\S"
    )
    found = [match[0] for match in re.finditer(looks_secret, text_of(file), re.IGNORECASE)]
    assert found == []


@pytest.mark.parametrize(
    ("file", "placeholder"), [(file, it) for file, placeholders in PLACEHOLDERS.items() for it in placeholders]
)
def test_what_a_user_must_change_is_marked(file: str, placeholder: str) -> None:
    """On the line itself, or on the first line of the command it stands in."""
    lines = text_of(file).splitlines()
    places = [number for number, line in enumerate(lines) if placeholder in line]
    assert places
    for number in places:
        start = next(first for first in range(number, -1, -1) if re.match(r"\s*(- |[\w-]+:)", lines[first]))
        assert "# <-- yours" in lines[start], lines[number]


@pytest.mark.parametrize("name", ["head", "worker"])
def test_iam_policies_name_known_services_and_no_wildcard_action(name: str) -> None:
    policy = json.loads(text_of(f"deploy/aws/{name}-policy.json"))
    assert policy["Version"] == "2012-10-17"
    actions = [action for statement in policy["Statement"] for action in statement["Action"]]
    assert actions and not any("*" in action for action in actions)
    session = pytest.importorskip("botocore.session").get_session()
    for action in actions:
        service, operation = action.split(":")
        if service in ("ec2", "iam") and operation != "PassRole":  # a permission that is no call
            assert operation in session.get_service_model(service).operation_names, action
    if name == "worker":
        assert {action.split(":")[0] for action in actions} == {"s3"}
