"""What of an evaluation is done already, so that a stopped one goes on where it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_distill.files import write_json
from mlx_distill.plain_json import parse_object


class Parts:
    """Results of the parts of an evaluation, a file each; without a folder nothing is remembered.

    Args:
        key: of all that the results depend on. A result that was made under another one is made anew.
    """

    def __init__(self, folder: Path | None = None, key: str = ""):
        self.folder, self.key = folder, key

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, from the folder if it is there; as JSON has it, in either case.

        Args:
            name: of the part: "student/code" or the like.
        """
        path = None if self.folder is None else self.folder / f"{name.replace('/', '-')}.json"
        if path is not None and path.exists():
            try:
                known = parse_object(path.read_bytes(), finite=True)
            except ValueError:  # damaged: it is measured again
                known = {}
            if known.get("key") == self.key and "found" in known:
                return known["found"]
        found = json.loads(json.dumps(work()))
        if path is not None:
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"key": self.key, "found": found})
        return found

    def forget(self) -> None:
        """Remove what was kept: the evaluation is whole."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
