"""Runs whose answers come from a server: what is checked before, whole runs, and mlx-lm's own server."""

import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import workshop
from fake_server import KEY, Fake, Reply, fake, options, said, texts

from mlx_distill import endpoint, recipe
from mlx_distill.errors import RecipeError
from mlx_distill.options import Endpoint, Generate

__all__ = ["fake"]  # a fixture


# --- Before anything long --------------------------------------------------------------------------


def test_a_server_that_answers_passes(fake: Fake) -> None:
    given = options(fake).endpoint
    assert given is not None
    for models in (
        fake.models,
        Reply(404, b"no list"),
        Reply(405, b""),
        Reply(503, b"loading"),
        Reply(drop=True),
        Reply(body=b""),  # mlx-lm's server, where there is no folder of Hub models
    ):
        fake.models = models
        endpoint.check_server(given)


def test_a_server_that_cannot_answer_is_refused_in_one_line(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(url: str, **more: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            endpoint.check_server(Endpoint(url=url, model="m", **more))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with socket.create_server(("127.0.0.1", 0)) as closing:
        nobody = f"http://127.0.0.1:{closing.getsockname()[1]}/v1"
    assert line(nobody) == (
        f"`generate.endpoint.url`: {nobody}: nobody answers (connection refused); "
        "start the server, or correct the url"
    )
    assert "nobody answers (" in line("http://no-such-host.invalid/v1")
    assert "TINY_KEY is not set" in line(nobody, key_variable="TINY_KEY")
    fake.models = Reply(body=b"<html>my router</html>")
    assert "no JSON ('<html>my router</html>'); name the address of an OpenAI-compatible" in line(fake.url)
    fake.models = Reply(401, b"")
    assert "wants a key" in line(fake.url)
    secure = fake.url.replace("http:", "https:")
    assert "nobody answers (" in line(secure)


BAD = {
    "url=http://me:pass@host/v1": "`generate.endpoint.url`: no name or password in it",
    "url=http://host/v1?api_key=pass": "ends with its path",
    "url=host:8080/v1": "an address such as http://192.168.1.20:8080/v1; got 'host:8080/v1'",
    "url=http://[::1/v1": "an address such as",
    "url=http://host:99999/v1": "an address such as",
    "url=http://host/v1/chat/completions": "up to /v1",
    "key_variable=sk-pass": "the name of an environment variable in capital letters",
    "at_once=0": "`generate.endpoint.at_once`",
}
RECIPE = """
name: tiny
student: {model: embedded}
data: {prompts: {source: pocket, rows: 4}}
generate: {endpoint: {url: "http://localhost:1/v1/", model: m}}
objective: {cross_entropy: {}}
train: {steps: 2}
evaluate: {tasks: []}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize("change", BAD)
def test_a_bad_option_is_said_and_no_secret_in_it(file: Path, change: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(file, [f"generate.endpoint.{change}"])
    assert BAD[change] in str(caught.value) and "pass@" not in str(caught.value)
    assert "=pass" not in str(caught.value) and "sk-pass" not in str(caught.value)


def test_a_recipe_with_an_endpoint_needs_prompts_and_no_teacher(file: Path) -> None:
    loaded = recipe.load(file)
    assert loaded.teacher is None
    assert loaded.generate.endpoint is not None and loaded.generate.endpoint.url == "http://localhost:1/v1"
    with pytest.raises(RecipeError, match="objective `forward_kl` needs a `teacher`"):
        recipe.load(file, ["objective.forward_kl.weight=1"])
    with pytest.raises(RecipeError, match="name a `teacher`, or a `generate.endpoint`"):
        recipe.load(file, ["generate.endpoint=null"])
    with pytest.raises(RecipeError, match=r"`generate.endpoint` answers `data.prompts`, which is missing"):
        recipe.load(file, ["data.prompts=null", "data.train.source=pocket", "data.train.rows=4"])
    with pytest.raises(RecipeError, match=r"`generate.thinking` is a part of chats"):
        recipe.load(file, ["generate.endpoint.chat=false", "generate.thinking=true"])


def test_how_a_server_is_reached_makes_no_other_run(file: Path) -> None:
    """A run that a slow or moved server stopped goes on with another timeout or address."""
    before = recipe.fingerprint(recipe.load(file))
    speeds = ("timeout=600", "at_once=1", "retries=9", "per_minute=3")
    for change in ("url=http://other/v1", "key_variable=K", *speeds):
        assert recipe.fingerprint(recipe.load(file, [f"generate.endpoint.{change}"])) == before
    for change in ("model=n", "chat=false"):
        assert recipe.fingerprint(recipe.load(file, [f"generate.endpoint.{change}"])) != before


# --- Runs ------------------------------------------------------------------------------------------

RUN = """
name: tiny
student:
  shape: {{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}}
  tokenizer: {{pieces: 275}}
data: {{train: train.jsonl, prompts: prompts.jsonl, test: train.jsonl, max_tokens: 128}}
generate:
  max_tokens: 60
  endpoint: {{url: "{url}", model: tiny, key_variable: TINY_KEY, retries: 0, at_once: 1}}
objective: {{cross_entropy: {{}}}}
train: {{steps: 2, batch_tokens: 256, learning_rate: 1e-2, log_every: 1, save_every: 0}}
evaluate: {{tasks: [fidelity]}}
export: {{formats: []}}
"""


@pytest.fixture
def folder(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a server, six labelled rows and twenty prompts."""
    monkeypatch.setenv("TINY_KEY", KEY)
    for name, rows in {
        "train": [{"prompt": f"add {i} to x:", "completion": f" x + {i}"} for i in range(6)],
        "prompts": [{"prompt": f"take {i} from x:"} for i in range(20)],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    (tmp_path / "recipe.yaml").write_text(RUN.format(url=fake.url), encoding="utf-8")
    return tmp_path


def written_rows(folder: Path) -> list[dict[str, Any]]:
    lines = (
        (folder / "runs" / "tiny" / "samples" / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return [json.loads(line) for line in lines]


def test_a_student_learns_from_a_server_alone(
    folder: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    """From prompts to report without a teacher; later stages do not need the server; no trace of the key."""
    good = fake.answer
    odd = {
        "take 3 from x:": Reply(400, {"error": f"no thanks, {KEY}"}),
        "take 4 from x:": Reply(body=said("x - ", "length")),
        "take 5 from x:": Reply(body=said("")),
    }
    fake.answer = lambda body: odd.get(body["messages"][-1]["content"]) or good(body)
    ended = workshop.command(folder, capsys, "run", "recipe.yaml")
    assert ended.code == 0, ended.err
    assert (
        "server answers: 17 of 20 kept (dropped: 1 refused, 1 unfinished within 60 tokens, 1 empty)"
        in ended.out
    )
    rows = written_rows(folder)
    assert [row["reason"] for row in rows if not row["kept"]] == [
        "refused: 400: no thanks, ***",
        "unfinished within 60 tokens",
        "empty",
    ]
    assert rows[0]["answer"] == "answer to take 0 from x:"
    run = folder / "runs" / "tiny"
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    assert stages["train"]["rows"] == 6 + 17 and stages["baseline"]["rows"] == 6
    models = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["models"]
    assert models.keys() == {"student_before", "baseline", "student"}
    assert (run / "report.html").exists()
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in ended.out + "".join(ended.err)
    fake.models = Reply(401, b"")  # who asks now is turned away
    again = workshop.command(folder, capsys, "evaluate", "recipe.yaml")
    assert again.code == 0, again.err


def test_a_run_goes_on_where_its_server_failed(
    folder: Path, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is asked for twice, also with other settings of the connection; the files are the same."""
    whole = workshop.command(folder, capsys, "generate", "recipe.yaml")
    assert whole.code == 0, whole.err
    undisturbed = {
        path.name: path.read_bytes() for path in (folder / "runs" / "tiny" / "samples").rglob("*.jsonl")
    }
    fake.asked.clear()
    good, first = fake.answer, deque([Reply(500, b"out of breath")])
    fake.answer = lambda body: (
        first.popleft() if body["messages"][-1]["content"] == "take 17 from x:" and first else good(body)
    )
    ended = workshop.command(folder, capsys, "generate", "recipe.yaml", "--overwrite")
    assert ended.code == 75
    assert "no answer to prompts.jsonl:18 in 1 try (status 500: out of breath); 17 of 20" in ended.err[-1]
    assert ended.err[0].startswith("go on with: ")
    asked = len(fake.asked)
    changes = ("generate.endpoint.at_once=3", "generate.endpoint.retries=2")
    ended = workshop.command(folder, capsys, "generate", "recipe.yaml", *changes, "--resume")
    assert ended.code == 0, ended.err
    assert len(fake.asked) - asked == 3
    assert undisturbed == {
        path.name: path.read_bytes() for path in (folder / "runs" / "tiny" / "samples").rglob("*.jsonl")
    }


def test_a_run_without_its_server_ends_at_once_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    ended = workshop.command(tmp_path, capsys, "run", "recipe.yaml")
    assert ended.code == 2
    assert ended.err == [
        "error: `generate.endpoint.url`: http://localhost:1/v1: nobody answers (connection refused); "
        "start the server, or correct the url"
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_server_of_mlx_lm_answers_as_the_model_does_here(tmp_path: Path) -> None:
    """Greedy, with log-probabilities: the same text from the embedded model on either way."""
    from mlx_distill import models
    from mlx_distill.data import pocket
    from mlx_distill.data.template import decode_answer, encode_prompt, end_of_turn_ids
    from mlx_distill.generate import generate

    folder = workshop.REPOSITORY / "mlx_distill" / "assets" / "teacher"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    server = subprocess.Popen(
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        there = {"url": f"http://127.0.0.1:{port}/v1", "model": "default_model", "chat": False}
        given = Generate.model_validate({"endpoint": there, "max_tokens": 200})
        assert given.endpoint is not None
        while True:  # until it listens
            assert server.poll() is None
            try:
                endpoint.check_server(given.endpoint)
                break
            except RecipeError:
                time.sleep(0.2)
        rows = pocket.rows("code", "test", 6)
        asked = [(i, row, 0) for i, row in enumerate(rows)]
        written = endpoint.write_block(given, asked, seed=0)
        hot = given.model_copy(update={"temperature": 2.0, "max_tokens": 40})
        drawn, again, other = (endpoint.write_block(hot, asked[:2], seed=seed) for seed in (0, 0, 1))
    finally:
        server.terminate()
        server.wait()
    here = models.load("embedded", "teacher")
    answers = generate(
        here.model,
        [encode_prompt(row, here.tokenizer) for row in rows],
        end_of_turn_ids(here.tokenizer),
        max_tokens=200,
        batch_size=6,
    )
    assert texts(written) == [decode_answer(answer.tokens, here.tokenizer) for answer in answers]
    assert all(one.finished and one.mean_nll is not None and 0 <= one.mean_nll < 0.5 for one in written)
    assert texts(drawn) == texts(again) != texts(other), "this server heeds the seed"
