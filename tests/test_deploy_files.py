"""The files in deploy/ are valid, limited, unprivileged, and contain no secret.

Kubernetes objects are validated against its schemas, KubeRay's objects against the operator's. An
unknown field is an error here, although the API server drops it silently. The install commands of
the Dockerfiles run in an empty environment.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SCHEMAS = ROOT.parent / "shared" / "schemas"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OBJECTS = [
    (file, item)
    for file in MANIFESTS
    for item in yaml.safe_load_all(file.read_text())
    if item is not None
]
KUBERAY = [item for _, item in OBJECTS if item["apiVersion"].startswith("ray.io/")]
PLAIN = [item for _, item in OBJECTS if not item["apiVersion"].startswith("ray.io/")]


def object_id(item: Any) -> str:
    return f"{item['kind']} {item['metadata']['name']}" if isinstance(item, dict) else str(item)


# ------------------------------------------------------------------------- Kubernetes


def test_the_manifests_contain_every_promised_kind_of_object():
    kinds = [item["kind"] for _, item in OBJECTS]
    for kind in ("RayCluster", "RayJob", "RayService", "Deployment", "Service", "NetworkPolicy"):
        assert kind in kinds


@pytest.mark.parametrize("item", PLAIN, ids=object_id)
def test_objects_are_valid_by_the_kubernetes_schema_without_unknown_fields(item):
    import kubernetes_validate

    kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def test_validation_rejects_a_field_that_kubernetes_does_not_know():
    import kubernetes_validate

    item = copy.deepcopy(next(item for item in PLAIN if item["kind"] == "Deployment"))
    item["spec"]["template"]["spec"]["runAsRoot"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def schema_of(item: dict[str, Any]) -> dict[str, Any]:
    file = SCHEMAS / f"{item['kind'].lower()}s.v1.schema.json"
    if not file.is_file():
        pytest.skip(f"KubeRay's schemas ({file}) are not on this machine")
    return dict(json.loads(file.read_text()))


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of fields that the schema does not name; OpenAPI permits them."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        properties, additional = schema.get("properties", {}), schema.get("additionalProperties")
        for name, inner in value.items():
            if name in properties:
                yield from unknown_fields(inner, properties[name], f"{path}.{name}")
            elif isinstance(additional, dict):
                yield from unknown_fields(inner, additional, f"{path}.{name}")
            elif additional is not True and (properties or path != ".metadata"):
                yield f"{path}.{name}"
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unknown_fields(inner, schema.get("items", {}), f"{path}[{index}]")


@pytest.mark.parametrize("item", KUBERAY, ids=object_id)
def test_ray_objects_are_valid_by_the_kuberay_schema_without_unknown_fields(item):
    import jsonschema

    schema = schema_of(item)
    jsonschema.validate(item, schema)
    assert list(unknown_fields(item, schema)) == []


@pytest.mark.parametrize("item", KUBERAY, ids=object_id)
def test_validation_finds_a_field_that_kuberay_does_not_know_at_any_depth(item):
    schema = schema_of(item)
    wrong = copy.deepcopy(item)
    (container, *_) = containers(wrong)
    container["securityContext"]["readOnlyRootFileSystem"] = True  # wrong capital S
    wrong["spec"]["rayversion"] = "2"
    result = list(unknown_fields(wrong, schema))
    assert any(path.endswith(".securityContext.readOnlyRootFileSystem") for path in result)
    assert ".spec.rayversion" in result


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every pod spec in an object, at any depth."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def containers(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Every container of an object, including the autoscaler's of a Ray head."""
    result = [
        c for pod in pods(item) for k in ("containers", "initContainers") for c in pod.get(k, [])
    ]
    return result + [cluster["autoscalerOptions"] for cluster in clusters(item)]


def clusters(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The Ray clusters of an object."""
    spec = item.get("spec", {})
    inner = [spec.get("rayClusterSpec"), spec.get("rayClusterConfig")]
    own = [spec] if item["kind"] == "RayCluster" else []
    return own + [cluster for cluster in inner if cluster]


WITH_PODS = [item for _, item in OBJECTS if list(pods(item))]


@pytest.mark.parametrize("item", WITH_PODS, ids=object_id)
def test_no_container_is_root_or_can_become_root(item):
    for pod in pods(item):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] >= 10_000
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    assert containers(item)
    for container in containers(item):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in context


@pytest.mark.parametrize("item", WITH_PODS, ids=object_id)
def test_every_container_has_resource_limits_and_requests(item):
    for container in containers(item):
        resources = container["resources"]
        assert resources["limits"].keys() >= {"cpu", "memory"}
        assert resources["requests"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("item", WITH_PODS, ids=object_id)
def test_writable_folders_are_mounted_under_the_read_only_root(item):
    for pod in pods(item):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes
            assert "/tmp" in mounts
            assert container["name"] not in ("ray-head", "ray-worker") or "/dev/shm" in mounts


@pytest.mark.parametrize("item", KUBERAY, ids=object_id)
def test_every_ray_cluster_uses_token_authentication_and_the_locked_version(item):
    assert clusters(item)
    locked = re.search(r"^ray==([\d.]+)", (DEPLOY / "arrowhead.lock").read_text(), re.MULTILINE)
    for cluster in clusters(item):
        assert cluster["authOptions"] == {"mode": "token"}
        assert locked and cluster["rayVersion"] == locked[1]
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_only_a_ray_head_has_a_kubernetes_service_account_token():
    for item in WITH_PODS:
        heads = [id(cluster["headGroupSpec"]["template"]["spec"]) for cluster in clusters(item)]
        for pod in pods(item):
            has_token = pod.get("automountServiceAccountToken") is not False
            assert has_token == (id(pod) in heads)


def test_network_policies_deny_all_traffic_that_they_do_not_name():
    policies = {
        item["metadata"]["name"]: item["spec"] for item in PLAIN if "Policy" in item["kind"]
    }
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule["from"], name
            assert all("ipBlock" not in source for source in rule["from"]), name
        for rule in spec.get("egress", []):
            for target in rule["to"]:
                if "ipBlock" in target:
                    assert "169.254.0.0/16" in target["ipBlock"]["except"], name
                    assert rule["ports"], name
    for item in PLAIN:
        if item["kind"] == "Service":
            assert item["spec"]["type"] == "ClusterIP"


def test_labels_that_policies_select_exist_on_our_pods_or_those_of_kuberay():
    ours = {
        tuple(pair) for _, item in OBJECTS for labels in _labels(item) for pair in labels.items()
    }
    kuberays = {("ray.io/is-ray-node", "yes"), ("ray.io/node-type", "head")}
    for item in PLAIN:
        if item["kind"] == "NetworkPolicy":
            selected = item["spec"]["podSelector"].get("matchLabels", {})
            assert set(selected.items()) <= ours | kuberays


def _labels(value: Any) -> Iterator[dict[str, str]]:
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) if isinstance(value.get("spec"), dict) else False:
            yield value.get("metadata", {}).get("labels", {})
        for inner in value.values():
            yield from _labels(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _labels(inner)


def test_the_configuration_of_the_scoring_service_is_valid_for_ray_serve():
    schema = pytest.importorskip(
        "ray.serve.schema",
        reason="Ray Serve is not installed (arrowhead[serve])",
        exc_type=ImportError,
    )
    (service,) = [item for item in KUBERAY if item["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    result = schema.ServeDeploySchema.model_validate(config)
    (app,) = result.applications
    module, _, name = app.import_path.partition(":")
    tree = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert f"def {name}(" in tree
    assert [item.name for item in app.deployments] == re.findall(r'deployment\(name="(\w+)"', tree)


# ---------------------------------------------------------------------------- compose

SERVICES = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_listens_on_loopback_has_limits_and_is_unprivileged(name):
    item = SERVICES[name]
    for port in item.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    user = item["user"].split(":")
    assert all(int(part) >= 10_000 for part in user)
    assert item["read_only"] is True
    assert item["cap_drop"] == ["ALL"]
    assert item["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & item.keys()
    assert "/var/run/docker.sock" not in str(item.get("volumes"))
    assert item["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}
    assert item["restart"] in ("unless-stopped", "on-failure:5")
    assert (
        "test" in item["healthcheck"] or name == "bucket"
    )  # which exits when it has created the bucket


@pytest.mark.parametrize("name", SERVICES)
def test_the_image_of_a_service_is_pinned_to_a_version(name):
    image = SERVICES[name]["image"]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image)


def test_every_secret_is_a_file_outside_of_git_and_of_images():
    names = {name for item in SERVICES.values() for name in item.get("secrets", [])}
    assert names == COMPOSE["secrets"].keys()
    for name, item in COMPOSE["secrets"].items():
        assert item == {"file": f"./secrets/{name}"}
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().split()
    (first, *_) = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert first == "*"
    readme = (DEPLOY / "README.md").read_text()
    assert all(name in readme for name in names)


def test_services_start_after_their_dependencies_are_healthy():
    for item in SERVICES.values():
        for other, dependency in item.get("depends_on", {}).items():
            expected = "service_healthy" if "test" in SERVICES[other]["healthcheck"] else None
            assert dependency["condition"] == (expected or "service_completed_successfully")


def test_internal_services_have_no_external_network_and_no_port():
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "store", "bucket"):
        assert SERVICES[name]["networks"] == ["inside"]
        assert "ports" not in SERVICES[name]


# ----------------------------------------------------------------------------- secrets


def files() -> list[Path]:
    generated = (".lock", ".pyc")  # written by programs
    return [file for file in DEPLOY.rglob("*") if file.is_file() and file.suffix not in generated]


def test_no_file_holds_a_secret():
    for file in files():
        text = file.read_text()
        assert not re.search(r"AKIA|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{32,}\b", text), file
        for name, value in re.findall(
            r"(?im)^[\s-]*[\"']?(\w*(?:password|passwd|secret|token|api_?key)\w*)[\"']?"
            r"[ \t]*[:=][ \t]*(.+)$",
            text,
        ):
            plain = value.strip().strip("\"'")
            harmless = (
                plain.startswith(("$", "/run/secrets", "{", "[", "("))
                or "$(secret" in plain
                or name in ("automountServiceAccountToken", "secretName", "RAY_AUTH_MODE")
                or re.fullmatch(r"false|secrets|token", plain)
            )
            assert harmless, (file, name, value)


# --------------------------------------------------------------------------- Dockerfiles

DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*"))


def steps(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, without comments and line continuations."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    full = "\n".join(lines).replace("\\\n", " ")
    return [
        (instruction.upper(), " ".join(arguments.split()))
        for instruction, _, arguments in (
            line.partition(" ") for line in full.splitlines() if line.strip()
        )
    ]


def last_stage(file: Path) -> list[tuple[str, str]]:
    result = steps(file)
    start = max(at for at, (instruction, _) in enumerate(result) if instruction == "FROM")
    return result[start:]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_has_a_pinned_base_a_numeric_user_and_no_build_tools(file):
    result = steps(file)
    stages = {
        arguments.split()[-1]
        for instruction, arguments in result
        if instruction == "FROM" and " AS " in arguments
    }
    for instruction, arguments in result:
        if instruction == "FROM" and arguments.split()[0] not in stages:
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", arguments.split()[0])
    last = last_stage(file)
    users = [arguments for instruction, arguments in last if instruction == "USER"]
    assert users == ["10001:10001"]
    assert not [
        arguments
        for instruction, arguments in last
        if instruction == "RUN" and re.search(r"pip|uv |gcc|make", arguments)
    ]
    assert not [
        arguments
        for instruction, arguments in result
        if instruction == "ADD" or "curl" in arguments
    ]
    assert not [
        arguments
        for instruction, arguments in result
        if instruction in ("ARG", "ENV") and "PASSWORD" in arguments
    ]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_files_that_an_image_copies_exist_and_are_not_in_dockerignore(file):
    rules = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for instruction, arguments in steps(file):
        paths = [item for item in arguments.split() if not item.startswith("--")]
        if instruction == "COPY" and "--from=" not in arguments:
            for source_path in paths[:-1]:
                assert (ROOT / source_path).exists()
                assert any(
                    Path(source_path).match(rule) or rule.startswith(f"{source_path}/")
                    for rule in rules
                )


def test_the_cpu_image_installs_the_same_packages_as_the_gpu_image():
    def installs(name: str) -> list[str]:
        return [
            arguments
            for instruction, arguments in steps(DEPLOY / name)
            if instruction == "RUN" and "/opt/uv" in arguments
        ]

    assert installs("Dockerfile") == installs("Dockerfile.cpu") != []
    gpu, cpu = last_stage(DEPLOY / "Dockerfile"), last_stage(DEPLOY / "Dockerfile.cpu")
    assert gpu == cpu


def test_images_have_the_locked_versions():
    def pins(file: Path) -> dict[str, str]:
        return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;\\]+)", file.read_text(), re.MULTILINE))

    locked = pins(ROOT / "requirements.lock")
    for name in ("arrowhead", "mlflow"):
        result = pins(DEPLOY / f"{name}.lock")
        assert len(result) > 50
        assert {k: v for k, v in result.items() if locked.get(k, v) != v} == {}
        assert not result.keys() & {"pytest", "ruff", "moto", "mypy"}
    assert "torch" not in pins(DEPLOY / "mlflow.lock")
    tag = SERVICES["mlflow"]["image"].rpartition(":")[2]
    assert tag == pins(DEPLOY / "mlflow.lock")["mlflow"] == locked["mlflow"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.mlflow"])
def test_the_install_commands_work_in_an_empty_environment(name, tmp_path):
    # /opt and /src become folders in tmp_path, and the Python of this test replaces 3.12; the rest
    # is as in the image. uv links packages from its cache.
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        pytest.skip("uv is not in this environment (make setup puts it there)")
    source = tmp_path / "src"
    for instruction, arguments in steps(DEPLOY / name):
        paths = [item for item in arguments.split() if not item.startswith("--")]
        if instruction == "COPY" and paths[-1].startswith("/src"):
            target = Path(str(tmp_path) + paths[-1])
            target.mkdir(parents=True, exist_ok=True)
            for source_path in paths[:-1]:
                if (ROOT / source_path).is_dir():
                    shutil.copytree(ROOT / source_path, target, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / source_path, target)
        elif instruction == "RUN" and "/opt/uv" in arguments:
            line = re.sub(r"--mount=\S+ ", "", arguments)
            line = re.sub(r"(?<![\w.])/(opt|src)\b", rf"{tmp_path}/\1", line)
            line = line.replace("python3.12 ", f"{sys.executable} ")
            completed = subprocess.run(
                ["sh", "-ec", line], capture_output=True, text=True, cwd=tmp_path
            )
            assert completed.returncode == 0, completed.stderr
    result = tmp_path / "opt" / "venv"
    if name == "Dockerfile":
        assert source.is_dir()
        shutil.copytree(tmp_path / "opt" / "package", result, dirs_exist_ok=True)
        paths = [result / "bin" / "arrowhead", "--version"]
        expected = re.search(
            r'__version__ = "(.+)"', (ROOT / "src/arrowhead/__init__.py").read_text()
        )
    else:
        paths = [result / "bin" / "mlflow", "--version"]
        expected = re.search(r"^mlflow==(\S+)", (DEPLOY / "mlflow.lock").read_text(), re.MULTILINE)
    completed = subprocess.run(paths, capture_output=True, text=True, cwd=tmp_path)
    assert expected and expected[1] in completed.stdout, completed.stderr
    assert not [tool for tool in ("pip", "uv", "pytest") if (result / "bin" / tool).exists()]
    shutil.rmtree(tmp_path / "opt")
