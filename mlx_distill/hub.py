"""From the name of a model or dataset to a folder on this machine.

What is not a folder here is fetched by huggingface_hub, which keeps its cache, its login and its switches
(`HF_HUB_OFFLINE`, `HF_HOME`, `HF_ENDPOINT`). Only data is fetched: safetensors, JSON, text; never Python
files or pickles, so nothing that comes from the Hub can run. `--trust-remote-code` alone changes that, for
the Python files of tokenizers.
"""

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from mlx_distill.errors import DistillError, ModelError, NotFound
from mlx_distill.safetensors_check import check_model_folder

MODEL_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
DATASET_FILES = ["*.jsonl", "README.md"]  # the card, so that a dataset without .jsonl is cached too
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_name(name: str) -> bool:
    """Whether `name` has the form of a repository's, `organisation/name`."""
    return len(name) <= 96 and _NAME.fullmatch(name) is not None


def model_folder(
    name: str,
    where: str,
    *,
    endpoint: str | None = None,
    cache: Path | None = None,
    local_files_only: bool = False,
    trust: bool = False,
) -> Path:
    """The folder of a model: config, weights whose files are sound, tokenizer. No weight is read.

    Args:
        name: `embedded`, a folder, or a repository on the Hub.
        where: the recipe key that named it, such as "teacher.model"; opens every message.
        endpoint, cache, local_files_only: null and False leave them to huggingface_hub's own settings.
        trust: its tokenizer may be Python code.

    Raises:
        NotFound: neither a folder nor a repository that can be reached.
        ModelError: a folder that is no model, or a repository that may not be read.
    """
    path = os.path.expanduser(name)  # os.path: unlike Path, it takes any string for a name that is not there
    if name == "embedded":
        folder = Path(str(resources.files("mlx_distill"))) / "assets" / "teacher"
    elif os.path.isfile(path):
        raise ModelError(f"{where}: {name} is a file; name the folder that it lies in")
    elif os.path.exists(path):
        folder = Path(path)
    elif is_name(name):
        files = [*MODEL_FILES, "*.py"] if trust else MODEL_FILES
        folder = fetch(name, "model", files, where, endpoint, cache, local_files_only)
    else:
        raise NotFound(
            f"{where}: no folder {name!r}; name a model folder, `embedded`, "
            "or a Hub repository as organisation/name"
        )
    try:
        check_model_folder(folder, trust=trust)
    except DistillError as error:
        raise type(error)(f"{where}: {error}") from None
    return folder


def dataset_folder(
    name: str,
    *,
    where: str = "data",
    endpoint: str | None = None,
    cache: Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder with the .jsonl files of a dataset on the Hub, if it has any; arguments as above.

    Raises:
        NotFound: no such repository, or it cannot be reached.
        ModelError: a repository that may not be read.
    """
    return fetch(name, "dataset", DATASET_FILES, where, endpoint, cache, local_files_only)


def fetch(
    name: str,
    kind: str,
    files: list[str],
    where: str,
    endpoint: str | None,
    cache: Path | None,
    local_files_only: bool,
) -> Path:
    import huggingface_hub  # a quarter of a second that most runs do without

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                repo_type=kind,
                allow_patterns=files,
                ignore_patterns=["*/*"] if kind == "model" else None,  # other formats lie in folders
                endpoint=endpoint,
                cache_dir=cache,
                local_files_only=local_files_only,
                tqdm_class=_late_bar(),
            )
        )
    except Exception as error:  # the HTTP library below, and so its errors, differ between versions
        raise explained(error, f"{where}: {kind} {name}", local_files_only) from error


def _late_bar() -> Any:
    """The client's own progress bar, shown on a terminal only, and only once it has run for two seconds.

    By itself it is drawn even where all files are in the cache, and into logs.
    """
    from huggingface_hub.utils import tqdm

    class LateBar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": options.get("disable") or None, "delay": 2})

    return LateBar


def explained(error: Exception, what: str, local_files_only: bool) -> DistillError:
    """What huggingface_hub raised, as one line with the next move."""
    from huggingface_hub import errors

    cause = error.__cause__
    reason = " ".join(str(cause or error).split())[:160]
    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"{what} is gated: accept the licence on its page on the Hub, then `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFound(
            f"{what} is neither a folder here nor a repository that you may see on the Hub; "
            "check the spelling, or `hf auth login` for a private one"
        )
    if isinstance(error, errors.IncompleteSnapshotError):
        return NotFound(f"{what} is only partly in the cache; go online once to fetch the rest")
    if isinstance(error, errors.LocalEntryNotFoundError):
        if local_files_only or isinstance(cause, errors.OfflineModeIsEnabled):
            return NotFound(f"{what} is not in the cache, and the Hub is switched off (HF_HUB_OFFLINE)")
        if isinstance(cause, errors.HfHubHTTPError):
            status = cause.response.status_code
            return NotFound(f"{what} is not in the cache, and the Hub answers with status {status}")
        return NotFound(f"{what} is neither here nor in the cache, and the Hub is out of reach ({reason})")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return ModelError(f"{what} cannot be fetched: the Hub answers with status {status}")
    return ModelError(f"{what} cannot be fetched ({type(error).__name__}: {reason})")
