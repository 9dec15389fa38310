"""Ray's own code for AWS, with cluster.yaml, against a simulated EC2: what it would launch, and with which rights."""

import fnmatch
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.client import BaseClient
from moto import mock_aws
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

ROOT = Path(__file__).resolve().parents[2]
REGION = "us-west-2"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An account after the commands of docs/cluster.md; each placeholder of cluster.yaml with its id there."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes its SSH key there
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "simulated")
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        ec2 = boto3.client("ec2", region_name=REGION)
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=network, CidrBlock="10.0.0.0/20", AvailabilityZone=f"{REGION}a")["Subnet"]
        group = ec2.create_security_group(GroupName="ft", Description="nodes of ft", VpcId=network)["GroupId"]
        iam = boto3.client("iam")
        for name in ("head", "worker"):
            trust = (ROOT / "deploy/aws/trust-policy.json").read_text()
            iam.create_role(RoleName=f"ft-{name}", AssumeRolePolicyDocument=trust)
            policy = (ROOT / f"deploy/aws/{name}-policy.json").read_text()
            iam.put_role_policy(RoleName=f"ft-{name}", PolicyName="ft", PolicyDocument=policy)
            iam.create_instance_profile(InstanceProfileName=f"ft-{name}")
            iam.add_role_to_instance_profile(InstanceProfileName=f"ft-{name}", RoleName=f"ft-{name}")
        yield {
            "subnet-00000000000000000": subnet["SubnetId"],
            "sg-00000000000000000": group,
            "ami-00000000000000000": ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
        }
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()


@pytest.fixture(scope="module")
def config(account: dict[str, str]) -> dict[str, Any]:
    """What `ray up` makes of the file before it launches the head."""
    text = (ROOT / "cluster.yaml").read_text()
    for placeholder, its_id in account.items():
        text = text.replace(placeholder, its_id)
    found: dict[str, Any] = bootstrap_aws(prepare_config(yaml.safe_load(text)))
    return found


@pytest.fixture(scope="module")
def launched(config: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """An instance of each node type as EC2 describes it, and the calls that the autoscaler made for them."""
    calls: set[str] = set()
    ec2 = boto3.client("ec2", region_name=REGION)
    with pytest.MonkeyPatch.context() as patch:
        call = BaseClient._make_api_call

        def recorded(self: BaseClient, operation: str, arguments: dict[str, Any]) -> Any:
            calls.add(f"{self.meta.service_model.service_name}:{operation}")
            return call(self, operation, arguments)

        patch.setattr(BaseClient, "_make_api_call", recorded)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, node_type in config["available_node_types"].items():
            kind = "head" if name == config["head_node_type"] else "worker"
            tags = {"ray-node-type": kind, "ray-user-node-type": name, "ray-node-name": f"ray-ft-{kind}"}
            provider.create_node(node_type["node_config"], tags, 1)
        nodes = provider.non_terminated_nodes({})
        tags_of = {node: provider.node_tags(node) for node in nodes}
        addresses = {node: provider.internal_ip(node) for node in nodes}
        described = ec2.describe_instances(InstanceIds=nodes)["Reservations"]
        provider.terminate_nodes([node for node in nodes if tags_of[node]["ray-node-type"] == "worker"])
    instances = [instance for page in described for instance in page["Instances"]]
    assert all(addresses.values())
    return {tags_of[it["InstanceId"]]["ray-user-node-type"]: it for it in instances}, calls


def test_every_type_is_launched_as_the_file_says(
    config: dict[str, Any], launched: tuple[dict[str, dict[str, Any]], set[str]], account: dict[str, str]
) -> None:
    instances, _ = launched
    assert set(instances) == set(config["available_node_types"])
    for name, instance in instances.items():
        asked = config["available_node_types"][name]["node_config"]
        assert instance["InstanceType"] == asked["InstanceType"], name
        assert "PublicIpAddress" not in instance, name
        assert instance["SubnetId"] == account["subnet-00000000000000000"]
        assert {group["GroupId"] for it in instance["NetworkInterfaces"] for group in it["Groups"]} == {
            account["sg-00000000000000000"]
        }
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert (instance.get("InstanceLifecycle") == "spot") == name.endswith("-spot")
        role = "ft-head" if name == config["head_node_type"] else "ft-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{role}")


def test_the_heads_role_allows_every_call_of_the_autoscaler(
    launched: tuple[dict[str, dict[str, Any]], set[str]],
) -> None:
    _, calls = launched
    policy = json.loads((ROOT / "deploy/aws/head-policy.json").read_text())
    allowed = [action for statement in policy["Statement"] for action in statement["Action"]]
    assert {"ec2:RunInstances", "ec2:TerminateInstances"} <= calls
    assert [call for call in calls if not any(fnmatch.fnmatch(call, action) for action in allowed)] == []
