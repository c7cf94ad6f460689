"""A model on the Hub is planned by the headers of its files: no weight is fetched."""

from pathlib import Path

import numpy as np
import pytest
import test_hub
from safetensors.numpy import save
from test_hub import CONFIG, REPOSITORIES, WEIGHTS, endpoint

from mlx_distill.errors import ModelError, NotFound
from mlx_distill.hub import model_folder
from mlx_distill.models.headers import stored_sizes
from mlx_distill.unfetched import Unfetched

__all__ = ["endpoint"]  # the Hub of `test_hub`, with what this file adds

LARGE = save({f"layer.{i}": np.ones((1024, 1024), np.float16) for i in range(3)})


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each answer of the Hub, which knows ranges."""
    bodies: list[int] = []
    plain = test_hub.Handler.send

    def send(self: test_hub.Handler, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        if told := self.headers.get("Range"):
            first, last = told.removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last) + 1], 206
        if self.command == "GET":
            bodies.append(len(body))
        plain(self, body, status, headers)

    monkeypatch.setattr(test_hub.Handler, "send", send)
    monkeypatch.setitem(REPOSITORIES, "models/lab/large", {"config.json": CONFIG, "model.safetensors": LARGE})
    return bodies


def test_only_headers_are_fetched(endpoint: str, tmp_path: Path, sent: list[int]) -> None:
    holes = tmp_path / "holes"
    holes.mkdir()
    unfetched = Unfetched(holes, endpoint=endpoint, cache=tmp_path / "cache")
    folder = unfetched("lab/large", "teacher.model")
    assert unfetched("lab/large", "teacher.others.0.model") == folder  # asked for once
    assert sum(sent) < 0.2 * len(LARGE)
    assert unfetched.gib == {"lab/large": pytest.approx(3 * 2**21 / 2**30)}
    weights = folder / "model.safetensors"
    assert weights.stat().st_blocks * 512 < 0.2 * len(LARGE)  # a hole

    whole = model_folder("lab/large", "teacher.model", endpoint=endpoint, cache=tmp_path / "cache")
    assert stored_sizes(whole)[1:] == stored_sizes(folder)[1:]
    assert stored_sizes(whole).bytes == pytest.approx(stored_sizes(folder).bytes, abs=256)  # padded header
    again = Unfetched(holes, endpoint=endpoint, cache=tmp_path / "cache")
    assert again("lab/large", "teacher.model") == whole and again.gib == {}  # now it is here


def test_what_is_here_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    assert Unfetched(tmp_path)(str(tmp_path), "teacher.model") == tmp_path
    with pytest.raises(NotFound, match="no folder './not'"):
        Unfetched(tmp_path)("./not", "teacher.model")


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("lab/gated", ModelError, "model lab/gated is gated"),
        ("lab/missing", NotFound, "model lab/missing is neither a folder here nor a repository"),
        ("lab/pickled", ModelError, r"model lab/pickled has no safetensors"),
    ],
)
def test_the_hub_says_no_in_one_line(
    name: str, kind: type[Exception], message: str, endpoint: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        Unfetched(tmp_path, endpoint=endpoint, cache=tmp_path)(name, "teacher.model")
    assert str(caught.value).startswith("teacher.model: ") and "\n" not in str(caught.value)
