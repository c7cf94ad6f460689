"""A folder with all that a tiny run needs, for tests that go through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import SHAPE

from mlx_distill import cli, models
from mlx_distill.data import pocket
from mlx_distill.options import NewTokenizer, Shape
from mlx_distill.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = """
name: tiny
student:
  shape: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
teacher: {model: teacher}
data: {train: good.jsonl, test: good.jsonl, max_tokens: 128}
objective:
  forward_kl: {weight: 1.0}
  cross_entropy: {weight: 0.5}
train: {steps: 4, batch_tokens: 256, learning_rate: 1e-2, log_every: 1, save_every: 0}
"""


def make(folder: Path) -> Path:
    """Fill `folder`: `teacher`, a `student` of its family, a `stranger`, data, and a recipe."""
    texts = [f"{row.prompt}{row.completion}" for row in pocket.rows("code", "train", 60)]
    tokenizer = train_tokenizer(texts, NewTokenizer(pieces=150, byte_fallback=False))
    other = train_tokenizer(texts, NewTokenizer(pieces=160, byte_fallback=False))
    wide = Shape(**{**SHAPE, "hidden_size": 64, "intermediate_size": 96})
    models.save(folder / "teacher", models.build(wide, tokenizer, 1))
    models.save(folder / "student", models.build(Shape(**SHAPE), tokenizer, 2))
    models.save(folder / "stranger", models.build(Shape(**SHAPE), other, 3))
    rows = [{"prompt": f"def add(x, {i}):", "completion": f" return x + {i}"} for i in range(12)]
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: list[str]  # lines


def command(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> Ended:
    """Run the command line in this process, in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["mlx-distill", *arguments])
        patch.setenv("PYTHONPATH", str(REPOSITORY))  # for the processes that it starts
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = capsys.readouterr()
    return Ended(int(ended.value.code or 0), said.out, said.err.splitlines())


def process(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_distill", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}
