"""The files for `ray up` are valid, open only ssh, and never start Ray without a token.

They are validated with Ray's own code, as `ray up` does. For Amazon, Ray creates machines in a mock
(moto); Google's and Microsoft's libraries are not installed here.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private import util
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "cluster").glob("*.yaml"))
CLOUDS = [file for file in FILES if file.stem != "onprem"]


def file_stem(file: Path) -> str:
    return file.stem


@pytest.fixture(params=FILES, ids=file_stem)
def file(request: Any) -> Path:
    return Path(request.param)


def read(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text()))


def prepare(file: Path) -> dict[str, Any]:
    """The file with Ray's defaults filled in, as `ray up` does before it calls the provider."""
    return dict(prepare_config(copy.deepcopy(read(file))))


def test_every_provider_that_the_readme_names_has_a_file():
    assert [file.stem for file in FILES] == ["aws", "azure", "gcp", "onprem"]
    text = (ROOT / "cluster" / "README.md").read_text()
    assert all(file.name in text for file in FILES)


def test_every_file_is_valid_by_rays_schema(file):
    validate_config(prepare(file))


def test_rays_schema_rejects_an_unknown_field(file):
    import jsonschema

    config = prepare(file)
    config["idle_timeout_minuets"] = 5
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


@pytest.mark.parametrize("file", CLOUDS, ids=file_stem)
def test_workers_are_spot_gpu_machines_scaled_from_zero_and_the_head_is_on_demand_cpu(file):
    config = prepare(file)
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    spot = re.compile(r'"(MarketType|priority)": "[sS]pot"|"provisioningModel": "SPOT"')
    assert not spot.search(json.dumps(head["node_config"]))
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert kinds
    for kind in kinds.values():
        assert spot.search(json.dumps(kind["node_config"]))
        assert kind["resources"]["GPU"] >= 1
        assert kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"]


def test_the_copied_files_exist_and_suffice_for_make_setup(file):
    mounts = read(file)["file_mounts"]
    ours = {
        target: source for target, source in mounts.items() if target.startswith("~/arrowhead/")
    }
    for target, source in ours.items():
        assert (ROOT / source).exists()
        assert target == f"~/arrowhead/{source}"
    assert {"src", "Makefile", "pyproject.toml", "requirements.lock"} <= set(ours.values())
    # Building the package needs the files that pyproject.toml names.
    for name in re.findall(r'(?:readme|license-files) = \[?"([^"]+)"', pyproject()):
        assert name in ours.values()
    assert any("make setup" in one for one in read(file)["setup_commands"])


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def test_ray_starts_only_with_token_authentication(file):
    config = read(file)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for words in ("head_start_ray_commands", "worker_start_ray_commands"):
        start_commands = [one for one in config[words] if "ray start" in one]
        assert len(start_commands) == 1
        prefix = start_commands[0].partition("ray start")[0]
        assert "chmod 600 ~/.ray/auth_token &&" in prefix
        assert re.search(r"export [^&]*RAY_AUTH_MODE=token[^&]*&&", prefix)


def test_the_dashboard_and_job_server_listen_on_loopback_only(file):
    (start,) = [one for one in read(file)["head_start_ray_commands"] if "ray start" in one]
    assert "--dashboard-host=127.0.0.1" in start
    text = file.read_text()
    assert "0.0.0.0" not in text
    assert "--ray-client-server-port" not in text


def test_no_file_contains_a_secret(file):
    text = file.read_text()
    assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|[0-9a-f]{32}", text)
    assert not re.search(r"(?i)(password|secret|token|key)\w*\s*[:=]\s*['\"]?[\w/+]{16,}", text)


def test_the_readme_names_every_placeholder(file):
    config = read(file)
    del config["file_mounts"]
    result = set(re.findall(r"(?<![\w:$-])[A-Z]{4,}(?:-\d)?(?![\w=-])", _join_values(config)))
    result -= {"SPOT", "PERSISTENT", "TERMINATE", "DELETE"}
    text = (ROOT / "cluster" / "README.md").read_text()
    assert result
    assert {word for word in result if f"`{word.partition('-')[0]}" not in text} == set()


def _join_values(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(_join_values(one) for pair in value.items() for one in pair)
    return " ".join(map(_join_values, value)) if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------- ports


def test_on_amazon_ray_starts_a_head_and_a_spot_worker_reachable_by_ssh_only(monkeypatch, tmp_path):
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as amazon
    from ray.autoscaler._private.aws import utils
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes its ssh key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    config = prepare(ROOT / "cluster" / "aws.yaml")
    validate_config(config)
    with mock_aws():
        utils.resource_cache.cache_clear()
        ec2 = boto3.client("ec2", config["provider"]["region"])
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for kind in config["available_node_types"].values():  # moto does not resolve names
            assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/")
            kind["node_config"]["ImageId"] = image
        iam = boto3.client("iam")
        for name in ("arrowhead-head", "arrowhead-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        result = amazon.bootstrap_aws(config)
        provider = AWSNodeProvider(result["provider"], result["cluster_name"])
        tags = {"ray-node-name": "x", "ray-launch-config": "x", "ray-node-status": "x"}
        for name, kind in result["available_node_types"].items():
            role = "head" if name == result["head_node_type"] else "worker"
            node_tags = {"ray-node-type": role, "ray-user-node-type": name}
            provider.create_node(kind["node_config"], tags | node_tags, 1)
        (group,) = [
            one
            for one in ec2.describe_security_groups()["SecurityGroups"]
            if one["GroupName"] == "arrowhead-ray"
        ]
        public_rules = [
            (rule["IpProtocol"], rule["FromPort"], rule["ToPort"])
            for rule in group["IpPermissions"]
            if rule["IpRanges"] or rule["Ipv6Ranges"]
        ]
        assert public_rules == [("tcp", 22, 22)]
        machines = {
            next(tag["Value"] for tag in one["Tags"] if tag["Key"] == "ray-node-type"): one
            for reservation in ec2.describe_instances()["Reservations"]
            for one in reservation["Instances"]
        }
        assert machines.keys() == {"head", "worker"}
        assert machines["worker"]["InstanceType"] == "g6.4xlarge"
        assert machines["worker"].get("InstanceLifecycle") == "spot"
        assert machines["head"].get("InstanceLifecycle") is None
        for one in machines.values():
            assert [g["GroupId"] for g in one["SecurityGroups"]] == [group["GroupId"]]
        utils.resource_cache.cache_clear()


def test_on_azure_only_ssh_is_open_and_workers_have_no_public_address():
    template = Path(util.__file__).parent / "_azure" / "azure-config-template.json"
    (rules,) = [
        one["properties"]["securityRules"]
        for one in json.loads(template.read_text())["resources"]
        if one["type"] == "Microsoft.Network/networkSecurityGroups"
    ]
    assert [(one["properties"]["destinationPortRange"]) for one in rules] == ["22"]
    provider = read(ROOT / "cluster" / "azure.yaml")["provider"]
    assert provider["use_internal_ips"] is True


def test_on_google_machines_are_in_their_own_network_with_ssh_only():
    for name, kind in read(ROOT / "cluster" / "gcp.yaml")["available_node_types"].items():
        (interface,) = kind["node_config"]["networkInterfaces"]
        assert interface["subnetwork"].endswith("/subnetworks/arrowhead")
        assert ("accessConfigs" in interface) == (name == "head")
    text = (ROOT / "cluster" / "README.md").read_text()
    rules = [line for line in text.splitlines() if "firewall-rules create" in line]
    assert len(rules) == 2
    assert "--allow tcp:22" in text
    assert "--source-tags arrowhead --target-tags arrowhead" in text


# ------------------------------------------------------------------------------- token


def test_a_head_in_token_mode_without_a_token_does_not_start(tmp_path):
    # The cluster files rely on this behaviour of Ray, so it is tested with every version of Ray.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ray = Path(sys.executable).with_name("ray")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--port=0", "--include-dashboard=false"],
        env=environment | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = head.communicate(timeout=120)
    finally:
        if head.poll() is None:
            os.killpg(head.pid, signal.SIGKILL)
    assert head.returncode != 0
    assert "token" in output.lower()
    assert not (tmp_path / ".ray" / "auth_token").exists()
