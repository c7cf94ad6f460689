"""What `fuzz.py` damages: two tiny models, data, a recipe; and a server that answers with files."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

RECIPE = """
name: tiny
student:
  shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
teacher: {model: teacher, source: cache, top_k: 8}
data: {train: good.jsonl, test: good.jsonl, prompts: asked.jsonl, max_tokens: 128}
generate: {max_tokens: 60, temperature: 1.0, samples: 2}
objective:
  forward_kl: {weight: 1.0}
  cross_entropy: {weight: 0.5}
train: {steps: 4, batch_tokens: 256, learning_rate: 1e-2, log_every: 1, save_every: 1}
evaluate: {tasks: [fidelity], baseline: false}
"""
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
}
TASK = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
ANSWER = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "3"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 1},
}


def fill(root: Path) -> None:
    """Make `root` with a `teacher`, a `student` of its family, data, answers of a server, and a recipe."""
    from mlx_distill import models
    from mlx_distill.data import pocket
    from mlx_distill.options import NewTokenizer, Shape
    from mlx_distill.tokenizer import train_tokenizer

    root.mkdir(parents=True)
    texts = [f"{row.prompt}{row.completion}" for row in pocket.rows("code", "train", 60)]
    tokenizer = train_tokenizer(texts, NewTokenizer(pieces=150, byte_fallback=False))
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, seed in (("teacher", 1), ("student", 2)):
        shape = Shape(**sizes, intermediate_size=96, max_position_embeddings=128)
        models.save(root / name, models.build(shape, tokenizer, seed))
        _write_lines(root / name / "generation_config.json", [{"eos_token_id": [tokenizer.eos_token_id]}])
    rows = [{"prompt": f"def add(x, {i}):", "completion": f" return x + {i}"} for i in range(12)]
    _write_lines(root / "good.jsonl", rows)
    _write_lines(root / "asked.jsonl", [{"prompt": f"def sub(x, {i}):"} for i in range(8)])
    _write_lines(root / "humaneval.jsonl", [PROBLEM])
    _write_lines(root / "mbpp.jsonl", [TASK])
    _write_lines(root / "answer.json", [ANSWER])
    _write_lines(root / "models.json", [{"data": [{"id": "tiny"}]}])
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, ...]]:
    """A server on this machine that answers with the files of a folder; options that name it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer("models.json")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.answer("answer.json")

        def answer(self, name: str) -> None:
            content = (folder / name).read_bytes()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield (f"generate.endpoint={{url: '{url}', model: tiny, retries: 0, timeout: 5, at_once: 1}}",)
        server.shutdown()
        thread.join()
