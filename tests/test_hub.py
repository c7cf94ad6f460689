"""Names become folders: the real client of the Hub against an endpoint on this machine, and its errors."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from mlx_distill.errors import ModelError, NotFound
from mlx_distill.hub import dataset_folder, is_name, model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "llama"}'
WEIGHTS = save({"weight": np.ones((2, 2), np.float32)})
REPOSITORIES = {
    "models/lab/good": {
        "config.json": CONFIG,
        "model.safetensors": WEIGHTS,
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "modeling_evil.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80\x04 a pickle",
        "onnx/model.safetensors": WEIGHTS,
    },
    "models/lab/pickled": {"config.json": CONFIG, "pytorch_model.bin": b"\x80\x04 a pickle"},
    "datasets/lab/rows": {"train.jsonl": b'{"text": "one"}\n', "load.py": b"raise SystemExit"},
    "datasets/lab/parquet": {"README.md": b"# rows", "data/train-00000.parquet": b"PAR1"},
}


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that a download needs."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if "lab/gated" in path:
            return self.send(b"", 403, {"X-Error-Code": "GatedRepo"})
        if "lab/broken" in path:
            return self.send(b"", 500)
        if match := re.fullmatch(r"/api/(models|datasets)/(lab/\w+)/(revision|tree)/\w+", path):
            kind, name, what = match.groups()
            files = REPOSITORIES.get(f"{kind}/{name}")
            if files is not None and what == "revision":
                return self.send_json({"id": name, "sha": COMMIT})
            if files is not None:
                entries = [{"type": "file", "path": f, "size": len(b)} for f, b in files.items()]
                return self.send_json([{**entry, "oid": f"{i:040d}"} for i, entry in enumerate(entries)])
        if match := re.fullmatch(rf"/(datasets/)?(lab/\w+)/resolve/(?:main|{COMMIT})/(.+)", path):
            body = REPOSITORIES.get(f"{'datasets' if match[1] else 'models'}/{match[2]}", {}).get(match[3])
            if body is not None:
                etag = f'"{sha256(body).hexdigest()}"'
                return self.send(body, 200, {"ETag": etag, "X-Repo-Commit": COMMIT})
        return self.send(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def send(self, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def nowhere() -> str:
    """An endpoint at which nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_repository_becomes_a_folder_without_code(
    endpoint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder("lab/good", "teacher.model", endpoint=endpoint, cache=tmp_path)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert capfd.readouterr() == ("", "")  # no bars into a log


def test_what_was_fetched_is_found_again_without_network(endpoint: str, nowhere: str, tmp_path: Path) -> None:
    fetched = model_folder("lab/good", "teacher.model", endpoint=endpoint, cache=tmp_path)
    assert model_folder("lab/good", "teacher.model", cache=tmp_path, local_files_only=True) == fetched
    assert model_folder("lab/good", "teacher.model", endpoint=nowhere, cache=tmp_path) == fetched
    fetched.joinpath("model.safetensors").unlink()
    with pytest.raises(NotFound, match="only partly in the cache"):
        model_folder("lab/good", "teacher.model", cache=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("lab/gated", ModelError, "model lab/gated is gated: accept the licence .*hf auth login"),
        ("lab/missing", NotFound, "model lab/missing is neither a folder here nor a repository"),
        ("lab/broken", NotFound, "model lab/broken is not in the cache, and .* status 500"),
        ("lab/pickled", ModelError, r"no model\*.safetensors"),
    ],
)
def test_the_hub_says_no_in_one_line(
    name: str, kind: type[Exception], message: str, endpoint: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        model_folder(name, "teacher.model", endpoint=endpoint, cache=tmp_path)
    assert str(caught.value).startswith("teacher.model: ")
    assert "\n" not in str(caught.value)


def test_without_network_and_cache(nowhere: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="lab/good is neither here nor in the cache.*out of reach"):
        model_folder("lab/good", "student.model", endpoint=nowhere, cache=tmp_path)
    with pytest.raises(NotFound, match="lab/good is not in the cache, and the Hub is switched off"):
        model_folder("lab/good", "student.model", cache=tmp_path, local_files_only=True)


def test_the_switch_of_the_hub_is_respected(endpoint: str, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is read by huggingface_hub when it is imported, so this takes a fresh process."""
    code = "from mlx_distill.hub import model_folder; model_folder('lab/good', 'teacher.model')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        "teacher.model: model lab/good is not in the cache, and the Hub is switched off (HF_HUB_OFFLINE)"
    )


def test_a_dataset_becomes_a_folder_of_jsonl(endpoint: str, tmp_path: Path) -> None:
    folder = dataset_folder("lab/rows", endpoint=endpoint, cache=tmp_path)
    assert [path.name for path in folder.iterdir()] == ["train.jsonl"]
    folder = dataset_folder("lab/parquet", endpoint=endpoint, cache=tmp_path)
    assert [path.name for path in folder.iterdir()] == ["README.md"]
    assert dataset_folder("lab/parquet", cache=tmp_path, local_files_only=True) == folder


def test_a_folder_here_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "lab" / "good"
    here.mkdir(parents=True)
    (here / "config.json").write_bytes(CONFIG)
    (here / "model.safetensors").write_bytes(WEIGHTS)
    assert model_folder("lab/good", "teacher.model") == Path("lab/good")
    shutil.rmtree(here)
    with pytest.raises(NotFound, match="teacher.model: no folder './lab/good'"):
        model_folder("./lab/good", "teacher.model")


def test_what_is_no_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="teacher.model: .*no config.json"):
        model_folder(str(tmp_path), "teacher.model")
    (tmp_path / "config.json").write_text("{]", encoding="utf-8")
    with pytest.raises(ModelError, match="config.json: not readable as JSON"):
        model_folder(str(tmp_path), "teacher.model")
    with pytest.raises(ModelError, match="config.json is a file; name the folder"):
        model_folder(str(tmp_path / "config.json"), "teacher.model")
    (tmp_path / "config.json").write_text('{"hidden_size": 64}', encoding="utf-8")
    with pytest.raises(ModelError, match="no `model_type`"):
        model_folder(str(tmp_path), "teacher.model")
    (tmp_path / "config.json").write_bytes(CONFIG)
    with pytest.raises(ModelError, match=r"no model\*.safetensors"):
        model_folder(str(tmp_path), "teacher.model")


@pytest.mark.parametrize(
    "name", ["qwen", "a/b/c", "../b", "/a", "a/", "a b/c", "x" * 5000, "~nobody-here/x", "a\0/b"]
)
def test_neither_folder_nor_name(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(NotFound, match="teacher.model: no folder .*organisation/name"):
        model_folder(name, "teacher.model")
