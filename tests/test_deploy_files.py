"""The files in deploy/ are valid, limited, unprivileged, and contain no secret.

Kubernetes' own objects against its schemas, KubeRay's against the operator's; a field that neither
knows is an error, where the API server would drop it without a word. What the Dockerfiles install
is installed, in an empty environment.
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
    (file, one)
    for file in MANIFESTS
    for one in yaml.safe_load_all(file.read_text())
    if one is not None
]
KUBERAY = [one for _, one in OBJECTS if one["apiVersion"].startswith("ray.io/")]
PLAIN = [one for _, one in OBJECTS if not one["apiVersion"].startswith("ray.io/")]


def named(one: Any) -> str:
    return f"{one['kind']} {one['metadata']['name']}" if isinstance(one, dict) else str(one)


# ------------------------------------------------------------------------- Kubernetes


def test_all_that_is_promised_is_there():
    kinds = [one["kind"] for _, one in OBJECTS]
    for kind in ("RayCluster", "RayJob", "RayService", "Deployment", "Service", "NetworkPolicy"):
        assert kind in kinds


@pytest.mark.parametrize("one", PLAIN, ids=named)
def test_kubernetes_takes_it_with_no_field_unknown(one):
    import kubernetes_validate

    kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found():
    import kubernetes_validate

    one = copy.deepcopy(next(one for one in PLAIN if one["kind"] == "Deployment"))
    one["spec"]["template"]["spec"]["runAsRoot"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def schema_of(one: dict[str, Any]) -> dict[str, Any]:
    file = SCHEMAS / f"{one['kind'].lower()}s.v1.schema.json"
    if not file.is_file():
        pytest.skip(f"KubeRay's schemas ({file}) are not on this machine")
    return dict(json.loads(file.read_text()))


def unknown(value: Any, schema: dict[str, Any], place: str = "") -> Iterator[str]:
    """Fields of a value that its schema does not name: OpenAPI lets them pass."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name, inner in value.items():
            if name in known:
                yield from unknown(inner, known[name], f"{place}.{name}")
            elif isinstance(more, dict):
                yield from unknown(inner, more, f"{place}.{name}")
            elif more is not True and (known or place != ".metadata"):
                yield f"{place}.{name}"
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from unknown(inner, schema.get("items", {}), f"{place}[{at}]")


@pytest.mark.parametrize("one", KUBERAY, ids=named)
def test_kuberay_takes_it_with_no_field_unknown(one):
    import jsonschema

    schema = schema_of(one)
    jsonschema.validate(one, schema)
    assert list(unknown(one, schema)) == []


@pytest.mark.parametrize("one", KUBERAY, ids=named)
def test_a_field_that_kuberay_does_not_know_is_found_at_any_depth(one):
    schema = schema_of(one)
    wrong = copy.deepcopy(one)
    (container, *_) = containers(wrong)
    container["securityContext"]["readOnlyRootFileSystem"] = True  # one capital too many
    wrong["spec"]["rayversion"] = "2"
    result = list(unknown(wrong, schema))
    assert any(place.endswith(".securityContext.readOnlyRootFileSystem") for place in result)
    assert ".spec.rayversion" in result


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in an object, however deep."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def containers(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Every container of an object, the autoscaler's beside a Ray head too."""
    result = [
        c for pod in pods(one) for k in ("containers", "initContainers") for c in pod.get(k, [])
    ]
    return result + [given["autoscalerOptions"] for given in clusters(one)]


def clusters(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The Ray clusters of an object."""
    spec = one.get("spec", {})
    inner = [spec.get("rayClusterSpec"), spec.get("rayClusterConfig")]
    own = [spec] if one["kind"] == "RayCluster" else []
    return own + [given for given in inner if given]


WITH_PODS = [one for _, one in OBJECTS if list(pods(one))]


@pytest.mark.parametrize("one", WITH_PODS, ids=named)
def test_no_container_is_root_or_can_become_it(one):
    for pod in pods(one):
        safe = pod["securityContext"]
        assert safe["runAsNonRoot"] is True
        assert safe["runAsUser"] >= 10_000
        assert safe["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    assert containers(one)
    for container in containers(one):
        safe = container["securityContext"]
        assert safe["allowPrivilegeEscalation"] is False
        assert safe["readOnlyRootFilesystem"] is True
        assert safe["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in safe


@pytest.mark.parametrize("one", WITH_PODS, ids=named)
def test_every_container_has_limits_and_asks_for_something(one):
    for container in containers(one):
        given = container["resources"]
        assert given["limits"].keys() >= {"cpu", "memory"}
        assert given["requests"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("one", WITH_PODS, ids=named)
def test_folders_written_under_a_read_only_root_are_mounted(one):
    for pod in pods(one):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes
            assert "/tmp" in mounts
            assert container["name"] not in ("ray-head", "ray-worker") or "/dev/shm" in mounts


@pytest.mark.parametrize("one", KUBERAY, ids=named)
def test_every_ray_cluster_has_a_token_and_the_locked_ray(one):
    assert clusters(one)
    locked = re.search(r"^ray==([\d.]+)", (DEPLOY / "arrowhead.lock").read_text(), re.MULTILINE)
    for given in clusters(one):
        assert given["authOptions"] == {"mode": "token"}
        assert locked and given["rayVersion"] == locked[1]
        assert given["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_only_a_head_with_an_autoscaler_may_ask_kubernetes_anything():
    for one in WITH_PODS:
        heads = [id(given["headGroupSpec"]["template"]["spec"]) for given in clusters(one)]
        for pod in pods(one):
            asks = pod.get("automountServiceAccountToken") is not False
            assert asks == (id(pod) in heads)


def test_nothing_is_reachable_that_no_policy_names():
    policies = {one["metadata"]["name"]: one["spec"] for one in PLAIN if "Policy" in one["kind"]}
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
    for one in PLAIN:
        if one["kind"] == "Service":
            assert one["spec"]["type"] == "ClusterIP"


def test_labels_that_policies_select_are_on_pods_of_ours_or_of_kuberay_s():
    ours = {tuple(pair) for _, one in OBJECTS for labels in _labels(one) for pair in labels.items()}
    kuberays = {("ray.io/is-ray-node", "yes"), ("ray.io/node-type", "head")}
    for one in PLAIN:
        if one["kind"] == "NetworkPolicy":
            chosen = one["spec"]["podSelector"].get("matchLabels", {})
            assert set(chosen.items()) <= ours | kuberays


def _labels(value: Any) -> Iterator[dict[str, str]]:
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) if isinstance(value.get("spec"), dict) else False:
            yield value.get("metadata", {}).get("labels", {})
        for inner in value.values():
            yield from _labels(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _labels(inner)


def test_serve_takes_the_configuration_of_the_scoring_service():
    schema = pytest.importorskip(
        "ray.serve.schema",
        reason="Ray Serve is not installed (arrowhead[serve])",
        exc_type=ImportError,
    )
    (service,) = [one for one in KUBERAY if one["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    result = schema.ServeDeploySchema.model_validate(config)
    (app,) = result.applications
    module, _, name = app.import_path.partition(":")
    tree = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert f"def {name}(" in tree
    assert [one.name for one in app.deployments] == re.findall(r'deployment\(name="(\w+)"', tree)


# ---------------------------------------------------------------------------- compose

SERVICES = COMPOSE["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_bound_limited_and_unprivileged(name):
    one = SERVICES[name]
    for port in one.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    user = one["user"].split(":")
    assert all(int(part) >= 10_000 for part in user)
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & one.keys()
    assert "/var/run/docker.sock" not in str(one.get("volumes"))
    assert one["deploy"]["resources"]["limits"].keys() >= {"cpus", "memory"}
    assert one["restart"] in ("unless-stopped", "on-failure:5")
    assert "test" in one["healthcheck"] or name == "bucket"  # which ends when it is done


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_s_image_is_pinned_and_not_latest(name):
    image = SERVICES[name]["image"]
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image)


def test_every_secret_is_a_file_outside_of_git_and_of_images():
    request = {name for one in SERVICES.values() for name in one.get("secrets", [])}
    assert request == COMPOSE["secrets"].keys()
    for name, one in COMPOSE["secrets"].items():
        assert one == {"file": f"./secrets/{name}"}
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().split()
    (first, *_) = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert first == "*"
    words = (DEPLOY / "README.md").read_text()
    assert all(name in words for name in request)


def test_services_wait_for_what_they_need_until_it_is_well():
    for one in SERVICES.values():
        for other, how in one.get("depends_on", {}).items():
            wanted = "service_healthy" if "test" in SERVICES[other]["healthcheck"] else None
            assert how["condition"] == (wanted or "service_completed_successfully")


def test_only_the_networks_that_publish_or_fetch_lead_outside():
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "store", "bucket"):
        assert SERVICES[name]["networks"] == ["inside"]
        assert "ports" not in SERVICES[name]


# ----------------------------------------------------------------------------- secrets


def files() -> list[Path]:
    result = (".lock", ".pyc")  # by programs
    return [file for file in DEPLOY.rglob("*") if file.is_file() and file.suffix not in result]


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
            fine = (
                plain.startswith(("$", "/run/secrets", "{", "[", "("))
                or "$(secret" in plain
                or name in ("automountServiceAccountToken", "secretName", "RAY_AUTH_MODE")
                or re.fullmatch(r"false|secrets|token", plain)
            )
            assert fine, (file, name, value)


# --------------------------------------------------------------------------- Dockerfiles

DOCKERFILES = sorted(DEPLOY.glob("Dockerfile*"))


def steps(file: Path) -> list[tuple[str, str]]:
    """Instructions and their words, comments and continuations resolved."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    full = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), " ".join(rest.split()))
        for word, _, rest in (line.partition(" ") for line in full.splitlines() if line.strip())
    ]


def last_stage(file: Path) -> list[tuple[str, str]]:
    result = steps(file)
    start = max(at for at, (word, _) in enumerate(result) if word == "FROM")
    return result[start:]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_an_image_is_pinned_runs_as_a_numbered_user_and_has_no_tools(file):
    result = steps(file)
    stages = {rest.split()[-1] for word, rest in result if word == "FROM" and " AS " in rest}
    for word, rest in result:
        if word == "FROM" and rest.split()[0] not in stages:
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", rest.split()[0])
    last = last_stage(file)
    users = [rest for word, rest in last if word == "USER"]
    assert users == ["10001:10001"]
    assert not [
        rest for word, rest in last if word == "RUN" and re.search(r"pip|uv |gcc|make", rest)
    ]
    assert not [rest for word, rest in result if word == "ADD" or "curl" in rest]
    assert not [rest for word, rest in result if word in ("ARG", "ENV") and "PASSWORD" in rest]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_files_that_an_image_copies_exist_and_are_not_ignored(file):
    rules = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for word, rest in steps(file):
        words = [one for one in rest.split() if not one.startswith("--")]
        if word == "COPY" and "--from=" not in rest:
            for near in words[:-1]:
                assert (ROOT / near).exists()
                assert any(Path(near).match(rule) or rule.startswith(f"{near}/") for rule in rules)


def test_the_image_without_a_gpu_installs_what_the_other_does():
    def installs(name: str) -> list[str]:
        return [rest for word, rest in steps(DEPLOY / name) if word == "RUN" and "/opt/uv" in rest]

    assert installs("Dockerfile") == installs("Dockerfile.cpu") != []
    gpu, cpu = last_stage(DEPLOY / "Dockerfile"), last_stage(DEPLOY / "Dockerfile.cpu")
    assert gpu == cpu


def test_images_hold_the_versions_of_the_lock():
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
def test_the_commands_that_install_work_in_an_empty_environment(name, tmp_path):
    # /opt and /src are folders here, and Python is the one that runs this test; the rest is as in
    # the image, where 3.12 runs it. uv links from its cache what is there.
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        pytest.skip("uv is not in this environment (make setup puts it there)")
    source = tmp_path / "src"
    for word, rest in steps(DEPLOY / name):
        words = [one for one in rest.split() if not one.startswith("--")]
        if word == "COPY" and words[-1].startswith("/src"):
            target = Path(str(tmp_path) + words[-1])
            target.mkdir(parents=True, exist_ok=True)
            for near in words[:-1]:
                if (ROOT / near).is_dir():
                    shutil.copytree(ROOT / near, target, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / near, target)
        elif word == "RUN" and "/opt/uv" in rest:
            line = re.sub(r"--mount=\S+ ", "", rest)
            line = re.sub(r"(?<![\w.])/(opt|src)\b", rf"{tmp_path}/\1", line)
            line = line.replace("python3.12 ", f"{sys.executable} ")
            done = subprocess.run(["sh", "-ec", line], capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    result = tmp_path / "opt" / "venv"
    if name == "Dockerfile":
        assert source.is_dir()
        shutil.copytree(tmp_path / "opt" / "package", result, dirs_exist_ok=True)
        words = [result / "bin" / "arrowhead", "--version"]
        wanted = re.search(
            r'__version__ = "(.+)"', (ROOT / "src/arrowhead/__init__.py").read_text()
        )
    else:
        words = [result / "bin" / "mlflow", "--version"]
        wanted = re.search(r"^mlflow==(\S+)", (DEPLOY / "mlflow.lock").read_text(), re.MULTILINE)
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert wanted and wanted[1] in done.stdout, done.stderr
    assert not [tool for tool in ("pip", "uv", "pytest") if (result / "bin" / tool).exists()]
    shutil.rmtree(tmp_path / "opt")
