"""Bundles as MLflow models: logged, registered under a name, downloaded by address.

log_model       logs a bundle as a run's model, without pickle
make_version    makes that model a version of a registered one
model_files     the files of a bundle in a store, by address
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arrowhead.errors import ConfigError
from arrowhead.tracking.address import without_secrets
from arrowhead.tracking.client import (
    TrackingConfig,
    find_run,
    first_line,
    get_or_none,
    open_for_reading,
    refuse_store_errors,
)
from arrowhead.wording import shell_command

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Recorded

MODEL_TAGS = ("dataset", "body", "recipe")  # tags that a run's model gets too
MAX_MODEL_NAME_CHARS = 250
NOT_FOR_SERVING = {
    "cyclopts",
    "matplotlib",
    "ray",
    "rich",
}  # dependencies that scoring never imports
Fetch = Callable[[str, Path], None]
"""Downloads one file of a remote folder: its name there, its path here. Raises FileNotFoundError
if there is none of that name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegistryConfig:
    """How a trained bundle is logged in MLflow, and the name to register it under."""

    register: str | None = None
    """Register the bundle as the next version of this model in MLflow's model registry."""
    alias: str = "champion"
    """Alias that --register moves to the new version, for models:/NAME@ALIAS. By convention in
    MLflow, champion is the model in use, and challenger a candidate to replace it."""
    log_model: bool = True
    """Log the bundle as an MLflow model, which MLflow can serve. Each training then stores a copy
    of the body's weights (85 MB for a ResNet34)."""

    def __post_init__(self) -> None:
        given = self.register
        if given is not None and not self.log_model:
            raise ConfigError(
                f"--register {given} and --no-log-model.",
                "a model that is logged: a registered version needs one.",
                "leave one of them out.",
            )
        if given is None:
            if self.alias != "champion":
                raise ConfigError(
                    f"--alias is {self.alias}, but nothing is registered.",
                    "--register NAME beside it.",
                    "give both or neither.",
                )
            return
        name, at, alias = given.partition("@")
        if at or not given.strip() or set(given) & set("/:") or given.startswith("."):
            raise ConfigError(
                f"--register is {given!r}.",
                "a name without / : @ that does not start with a dot.",
                f"give --register {name} --alias {alias or 'champion'}."
                if at
                else "give e.g. dogs.",
            )
        taken = self.alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", self.alias)
        if taken or not re.fullmatch(r"[\w-]{1,255}", self.alias):
            raise ConfigError(
                f"--alias is {self.alias!r}.",
                "letters, digits, _ and -; not latest and not v1, which MLflow keeps to itself.",
                "give champion or challenger.",
            )

    def later(self, bundle: Path) -> str:
        """The command that registers a bundle later."""
        alias = [] if self.alias == "champion" else ["--alias", self.alias]
        return shell_command(["arrowhead", "bundle", "register", bundle, self.register, *alias])


def model_files(uri: str, config: TrackingConfig) -> Fetch:
    """A function that downloads the files of a bundle in a tracking store, one by one.

    Args:
        uri: models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest, models:/m-… or
            runs:/RUN/model.
        config: the store.

    Raises:
        ConfigError: if nothing is there, if it holds no bundle, or if the store cannot be used;
            the returned function raises it, too.
    """
    where = without_secrets(config.uri)
    with open_for_reading(config, uri) as client:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        source = get_artifact_repository(
            _model_location(client, uri, where), tracking_uri=config.uri
        )
        within = [f"{one.path}/" for one in source.list_artifacts("artifacts") if one.is_dir]
        for inside in ("", *within):  # a folder of a run; in a model, under the name that it had
            names = {file.path for file in source.list_artifacts(inside.rstrip("/") or None)}
            if f"{inside}bundle.json" in names:
                break
        else:
            raise ConfigError(
                f"{uri} is in {where}, but holds no bundle of Arrowhead's.",
                "a model that `arrowhead fit` or `train` logged.",
                "give another model; load this one with the program that made it.",
            )

    def fetch(name: str, target: Path) -> None:
        with refuse_store_errors(config), tempfile.TemporaryDirectory(dir=target.parent) as draft:
            os.replace(source.download_artifacts(inside + name, draft), target)

    return fetch


def _model_location(client: MlflowClient, uri: str, where: str) -> str:
    """The address of a model's files. where: the store, for refusals."""
    kind, _, rest = uri.partition(":/")
    rest = rest.strip("/")
    if kind == "runs":
        run_id, _, name = rest.partition("/")
        return _location_in_run(client, run_id, name or "model", where)
    if re.fullmatch(r"m-\w+", rest):
        return str(_get_or_refuse(client.get_logged_model, rest, uri, where).artifact_location)
    match = re.fullmatch(r"(?P<name>[^/:]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+|latest))", rest)
    if not match:
        raise ConfigError(
            f"{uri} does not say which model.",
            "models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-… or runs:/RUN/model.",
            f"give e.g. models:/{rest.split('/')[0].split('@')[0] or 'NAME'}@champion.",
        )
    name, alias, version = match["name"], match["alias"], match["version"]
    model = get_or_none(client.get_registered_model, name)
    if model is None:
        names = [one.name for one in client.search_registered_models(max_results=1000)]
        raise _not_found(f"No model is registered as {name} in {where}", name, names)
    if alias and alias not in model.aliases:
        raise _not_found(f"The model {name} has no alias {alias}", alias, list(model.aliases))
    if alias:
        version = model.aliases[alias]
    elif version == "latest":
        version = str(max((int(one.version) for one in model.latest_versions), default=0))
    _get_or_refuse(partial(client.get_model_version, name), version, uri, where)
    source: str = client.get_model_version_download_uri(name, version)
    return (
        _model_location(client, source, where)
        if source.startswith(("models:", "runs:"))
        else source
    )


def _location_in_run(client: MlflowClient, run_id: str, name: str, where: str) -> str:
    """The address of a run's newest model of that name, or else of its artifacts of that name: a
    bundle that could not be logged as a model is kept there.
    """
    run = find_run(client, run_id)
    if run is None:
        raise _not_found(f"There is no run {run_id} in {where}", run_id, [])
    outputs = run.outputs.model_outputs if run.outputs else []
    models = [client.get_logged_model(output.model_id) for output in outputs]
    # `runs:/RUN/model` is the run's model, whatever it is called.
    if named := [one for one in models if name in (one.name, "model")]:
        return str(max(named, key=lambda one: one.creation_timestamp).artifact_location)
    kept = [file.path for file in client.list_artifacts(run_id) if file.is_dir]
    if name not in kept:
        names = sorted({one.name for one in models} | ({"bundle"} & set(kept)))
        raise _not_found(f"The run {run_id} has no model {name}", name, names)
    return f"{run.info.artifact_uri.rstrip('/')}/{name}"


def _get_or_refuse(get: Callable[[str], Any], key: str, uri: str, where: str) -> Any:
    """What `get` returns for a key, or a refusal if the store does not have it."""
    if (found := get_or_none(get, key)) is None:
        raise _not_found(f"There is no {uri} in {where}", key, [])
    return found


def _not_found(found: str, name: str, there: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(name, there, 3) or sorted(there)[:5]
    return ConfigError(
        f"{found}.",
        f"one that is there: {', '.join(close)}." if close else "one that is there.",
        "check the spelling, and --tracking-uri; `mlflow ui` lists what a store has.",
    )


def check_registrable(client: MlflowClient, name: str) -> None:
    """Raise ConfigError if no model can be registered under that name."""
    from mlflow.exceptions import MlflowException

    try:
        model = get_or_none(client.get_registered_model, name)
    except MlflowException as error:
        raise ConfigError(
            f"Nothing can be registered as {name}: {first_line(error)}",
            "a store with a model registry: a database, or an MLflow server on one.",
            "check --tracking-uri and MLFLOW_REGISTRY_URI, or leave out --register.",
        ) from error
    if model is not None and "mlflow.prompt.is_prompt" in model.tags:
        raise ConfigError(
            f"{name} is the name of a prompt in that registry.",
            "the name of a model, or a new one.",
            "give another --register.",
        )


def version_of(client: MlflowClient, name: str, digest: str) -> str | None:
    """The newest version of a registered model that was made from a bundle."""
    versions = client.search_model_versions(f"tags.bundle = '{digest}'")
    numbers = [int(one.version) for one in versions if one.name == name and one.status == "READY"]
    return str(max(numbers)) if numbers else None


def digest_of(bundle: Path) -> str:
    """A bundle's fingerprint, the same as `bundle.format.fingerprint`."""
    return hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()[:16]


def write_model(bundle: Path, draft: Path, logged: Any, run_id: str) -> None:
    """Write an MLflow pyfunc model to `draft`/model: bundle and this package's source, no pickle.

    The training's report is left out, and the input example is a drawn image, so that no photo of
    the user's is in the model but the golden images.
    """
    import pandas  # type: ignore[import-untyped]

    with warnings.catch_warnings():  # of MLflow, about the type hints of its own classes
        warnings.simplefilter("ignore", UserWarning)
        from mlflow.pyfunc import save_model
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    answer = [
        ColSpec(DataType.string, "label"),
        ColSpec(DataType.double, "probability"),
        ColSpec(Array(DataType.string), "labels"),
        ColSpec(Array(DataType.double), "probabilities"),
    ]
    either = [
        ColSpec(DataType.binary, "image", required=False),
        ColSpec(DataType.string, "path", required=False),
    ]
    example = pandas.DataFrame({"image": [_drawn_image()]})
    target, here = draft / "model", Path(__file__).parents[1]
    content = json.loads((bundle / "bundle.json").read_bytes())
    about = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        run_id=run_id,
        model_id=logged.model_id,
    )
    with _requirements_trusted():
        save_model(
            str(target),
            python_model=str(here / "inference" / "mlflow_model.py"),
            artifacts={"bundle": str(bundle.absolute())},
            # With Arrowhead's own source, the model gives the same where another version, or none,
            # is installed.
            code_paths=[str(here)],
            signature=ModelSignature(Schema(either), Schema(answer)),
            input_example=example,
            pip_requirements=_requirements(),
            metadata={"classes": content["classes"], "recipe": content["recipe_fingerprint"]},
            mlflow_model=about,
        )
    for unneeded in [*target.rglob("__pycache__"), *target.glob("artifacts/*/report")]:
        shutil.rmtree(unneeded, ignore_errors=True)


@contextlib.contextmanager
def _requirements_trusted() -> Iterator[None]:
    """MLflow does not compare the requirements with what is installed inside the block.

    They are what is installed, and the comparison lists the modules of every package: a second.
    """
    from mlflow.utils import environment

    name = "warn_dependency_requirement_mismatches"
    before = getattr(environment, name, None)
    if before is None:  # in this version of MLflow it is elsewhere, and is not skipped
        yield
        return
    setattr(environment, name, lambda requirements: None)
    try:
        yield
    finally:
        setattr(environment, name, before)


def _drawn_image() -> bytes:
    """A PNG for the input example, which everybody who may see the model can see."""
    from PIL import Image

    kept = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(kept, "png")
    return kept.getvalue()


def _requirements() -> list[str]:
    """Scoring's dependencies, pinned to the installed versions. MLflow's guess takes minutes."""
    from importlib.metadata import requires, version

    names = [
        re.split(r"[\[<>=!~; ]", line)[0]
        for line in requires("arrowhead") or []
        if "extra ==" not in line
    ]
    return [
        f"{one}=={version(one).partition('+')[0]}" for one in names if one not in NOT_FOR_SERVING
    ]


def log_model(client: MlflowClient, run_id: str, bundle: Path) -> str:
    """Log a bundle as a model of a run, unless it is there; its address, models:/m-…"""
    from mlflow.entities import LoggedModelOutput

    digest, run = digest_of(bundle), client.get_run(run_id)
    if there := _logged(client, run, digest):
        return f"models:/{there.model_id}"
    content = json.loads((bundle / "bundle.json").read_bytes())
    about = {name: run.data.tags[name] for name in MODEL_TAGS if name in run.data.tags}
    logged = client.create_logged_model(
        run.info.experiment_id,
        model_name(about.get("dataset", bundle.name), content),
        run_id,
        tags=about | {"bundle": digest, "task": content["task"]},
        params=run.data.params,
        model_type="image classifier",
    )
    try:
        with tempfile.TemporaryDirectory(prefix="arrowhead-model-") as draft:
            write_model(bundle, Path(draft), logged, run_id)
            client.log_model_artifacts(logged.model_id, str(Path(draft) / "model"))
    except BaseException:
        with contextlib.suppress(Exception):
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    return f"models:/{logged.model_id}"


def model_name(dataset: str, content: Mapping[str, Any]) -> str:
    """The name of a logged model: dogscats-resnet34-logistic. content: of its bundle.json."""
    trained = content.get("lineage", {}).get("training", {}).get("head")
    head = "logistic" if trained == "logistic" else content["head"]  # both are linear in form
    name = f"{dataset}-{content['recipe']['body']}-{head}"
    return re.sub(r"[/:.%\"']", "-", name)[:MAX_MODEL_NAME_CHARS]


def _logged(client: MlflowClient, run: Recorded, digest: str) -> Any:
    """The run's model of a bundle, or None."""
    from mlflow.entities import LoggedModelStatus

    for output in run.outputs.model_outputs if run.outputs else []:
        there = client.get_logged_model(output.model_id)
        if there.tags.get("bundle") == digest and there.status == LoggedModelStatus.READY:
            return there
    return None


def make_version(
    client: MlflowClient,
    run_id: str,
    bundle: Path,
    registry: RegistryConfig,
    print_line: Callable[[str], None],
) -> str:
    """Make the run's model of a bundle a version of a registered model, unless it is one.

    Returns:
        The version's address, models:/NAME/VERSION.

    Raises:
        LookupError: if the run has no model of the bundle.
    """
    name, digest = str(registry.register), digest_of(bundle)
    version = version_of(client, name, digest)
    if version is None:
        model = _logged(client, client.get_run(run_id), digest)
        if model is None:
            raise LookupError("the run has no MLflow model of it")
        if get_or_none(client.get_registered_model, name) is None:
            client.create_registered_model(name)
        created = client.create_model_version(
            name,
            # Not models:/m-…: MLflow would look that up in the process's default store.
            model.artifact_location,
            run_id,
            tags={"bundle": digest, "run_id": run_id, "model": f"models:/{model.model_id}"},
            model_id=model.model_id,
        )
        version = str(created.version)
        # The UI reads what `mlflow.register_model` would note here.
        noted = json.loads(model.tags.get("mlflow.modelVersions", "[]"))
        entry = json.dumps([*noted, {"name": name, "version": version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": entry})
    client.set_registered_model_alias(name, registry.alias, version)
    address = f"models:/{name}/{version}"
    print_line(f"registered: {address}, and as models:/{name}@{registry.alias}")
    return address
