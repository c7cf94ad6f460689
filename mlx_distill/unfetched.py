"""A model on the Hub as `plan` sees it before it was fetched: everything but its weights.

Of the weight files only the headers are asked for. They stand before holes of the right size, so that
whatever sizes or checks a folder takes it for the model's; a weight must not be read from it.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError, NotFound
from mlx_distill.hub import MODEL_FILES, explained, fetch, is_name, model_folder
from mlx_distill.safetensors_check import check_model_folder

GIB = 2**30


class Unfetched:
    """Gives folders as `hub.model_folder` does, and remembers which of them hold no weights.

    Args:
        folder: a temporary one, for files that stand for those on the Hub.
        endpoint, cache: null leaves them to huggingface_hub's own settings.
    """

    def __init__(self, folder: Path, *, endpoint: str | None = None, cache: Path | None = None):
        self.folder, self.endpoint, self.cache = folder, endpoint, cache
        self.gib: dict[str, float] = {}  # size of the weights that a run would fetch first, by name

    def __call__(self, name: str, where: str, *, trust: bool = False) -> Path:
        """The folder of a model; of a repository that is not in the cache one without weights.

        Raises:
            NotFound, ModelError: as `hub.model_folder`.
        """
        if os.path.exists(os.path.expanduser(name)) or not is_name(name):
            return model_folder(name, where, trust=trust)
        try:
            return model_folder(
                name, where, endpoint=self.endpoint, cache=self.cache, local_files_only=True, trust=trust
            )
        except NotFound:  # or only a part of it is here
            return self._headers_of(name, where, trust)

    def _headers_of(self, name: str, where: str, trust: bool) -> Path:
        made = self.folder / name.replace("/", "--")
        if made.exists():  # named twice in the recipe
            return made
        small = [pattern for pattern in MODEL_FILES if not pattern.endswith(".safetensors")]
        small += ["*.py"] if trust else []
        kept = fetch(name, "model", small, where, self.endpoint, self.cache, False)
        headers = self._headers(name, where)
        made.mkdir()
        for path in kept.iterdir():
            if path.is_file():
                (made / path.name).symlink_to(path.resolve())
        total = sum(_write(made / Path(file).name, header) for file, header in headers.items())
        check_model_folder(made, trust=trust)
        self.gib[name] = total / GIB
        return made

    def _headers(self, name: str, where: str) -> dict[str, Any]:
        """What huggingface_hub tells of each weight file."""
        import huggingface_hub

        try:
            return huggingface_hub.HfApi(self.endpoint).get_safetensors_metadata(name).files_metadata
        except huggingface_hub.errors.NotASafetensorsRepoError:
            raise ModelError(f"{where}: model {name} has no safetensors; convert it with mlx-lm") from None
        except Exception as error:  # the HTTP library below, and so its errors, differ between versions
            raise explained(error, f"{where}: model {name}", False) from error


def _write(path: Path, told: Any) -> int:
    """A file with this header, and a hole where the weights would be; the bytes of the hole.

    Args:
        told: huggingface_hub's SafetensorsFileMetadata.
    """
    header: dict[str, Any] = {
        name: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
        for name, one in told.tensors.items()
    }
    size = max((one.data_offsets[1] for one in told.tensors.values()), default=0)
    text = json.dumps({"__metadata__": told.metadata, **header} if told.metadata else header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return size
