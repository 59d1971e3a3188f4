"""Push a published folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from arrowhead import __version__
from arrowhead.errors import ConfigError

# What a folder that was pushed before may contain and this one may not.
REPLACED = ["model.safetensors", "model.onnx", "bundle/*"]


def push(folder: Path, repo: str, *, public: bool) -> str:
    """Push the files of `folder` in one commit.

    Args:
        folder: A folder that `publish.publish` wrote.
        repo: USER/NAME; the repository is created if it does not exist.
        public: Whether a new repository is public.

    Returns:
        The address of the repository.

    Raises:
        ConfigError: If huggingface_hub is not installed, nobody is logged in, or the hub cannot be
            reached or refuses. The folder stays as it is.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise ConfigError(
            f"{folder} is written, but cannot be pushed here: {error}.",
            "the package huggingface_hub.",
            "pip install 'arrowhead[hub]', and run the same command again.",
        ) from error
    token = huggingface_hub.get_token()
    if not token:
        raise ConfigError(
            f"{folder} is written, but not pushed: you are not logged in to the Hugging Face hub.",
            "a token with permission to write.",
            "run `hf auth login` or set HF_TOKEN, and run the same command again.",
        )
    disable_progress_bars()
    api = huggingface_hub.HfApi(token=token, library_name="arrowhead", library_version=__version__)
    try:
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Publish with Arrowhead",
            delete_patterns=REPLACED,
        )
    except Exception as error:  # of the network, of the hub, and of several libraries
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].replace(token, "…")[:300]
        raise ConfigError(
            f"{folder} is written, but could not be pushed to {repo}: {reason}",
            "a connection to the Hugging Face hub, and a token that may write to the repository.",
            "check both (`hf auth whoami`), and run the same command again.",
        ) from None  # a traceback could show the token
    return str(address)
