"""Where model and teacher differ: the right rows, and texts that join to the answer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model

from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode
from mlx_distill.evaluate.disagreement import disagreements
from mlx_distill.evaluate.fidelity import RowFidelity, fidelity
from mlx_distill.models import load_tokenizer
from mlx_distill.teacher import LiveTeacher

TEXTS = (
    "Once upon a time, there was a little girl.\nShe said: hello!",
    "  two leading spaces, and   three inside ",
    "def f(x):\n\treturn x  # tab\n",
    "Ünïcödé, 日本語, 鬱, Ελληνικά, עברית",
    "🎉🏽‍🎄 and 👩‍👩‍👧‍👦, é; 𠮷",
    "<tool_call>\n{}\n</tool_call>",
    "x",
)


@pytest.fixture(scope="module", params=["embedded", "stories", "qwen"])
def tokenizer(request: pytest.FixtureRequest, repository: Path) -> Any:
    if request.param == "embedded":
        folder = repository / "mlx_distill" / "assets" / "teacher"
    else:
        names = {"stories": "models/stories260K", "qwen": "tokenizers/qwen2.5"}
        folder = request.getfixturevalue("shared") / names[request.param]
    return load_tokenizer(folder, {"model_type": "none"})


def seen(row: Encoded, kl: float | list[float] = 1.0) -> RowFidelity:
    """A teacher that writes the row, and a model that repeats the token before."""
    counted = np.array(row.tokens[row.start :], dtype=np.int32)
    values = np.broadcast_to(np.array(kl, dtype=np.float32), counted.shape)
    mine = np.array(row.tokens[row.start - 1 : -1], dtype=np.int32)
    return RowFidelity(values, values, mine, counted)


def test_the_texts_join_to_the_answer(tokenizer: Any) -> None:
    rows = [Row(prompt="Tell me.", completion=text) for text in TEXTS]
    encoded = [encode(row, tokenizer) for row in rows]
    made = disagreements("student", rows, encoded, list(map(seen, encoded)), tokenizer)
    for text, one, found in zip(TEXTS, encoded, made, strict=True):  # all differ alike: as they were given
        counted, tokens = one.tokens[one.start :], found["tokens"]
        joined = "".join(entry[0] for entry in tokens)
        assert joined == decode_answer(counted, tokenizer)
        if "\ufffd" not in joined and "<unk>" not in joined:
            assert joined == text
        # No entry is empty but the last, which is the end of the turn; the KLs are all there.
        assert [entry[0] == "" for entry in tokens] == [False] * (len(tokens) - 1) + [True]
        assert sum(entry[1] for entry in tokens) == pytest.approx(len(counted))
        # The teacher wrote it: its choices are the texts, where an entry is one token.
        if len(tokens) == len(counted):
            assert [entry[3] for entry in tokens[:-1]] == [entry[0] for entry in tokens[:-1]]
        assert tokens[-1][3] == tokenizer.eos_token
        json.dumps(tokens)


def test_a_character_split_over_tokens_is_one_entry(shared: Path) -> None:
    """鬱 is three tokens of the Qwen tokenizer, and 😀 shares one with the space before it."""
    qwen = load_tokenizer(shared / "tokenizers" / "qwen2.5", {"model_type": "none"})
    row = Row(prompt="a", completion="鬱 🪿!")
    encoded = encode(row, qwen)
    count = len(encoded.tokens) - encoded.start
    alone = [qwen.decode([token]) for token in encoded.tokens[encoded.start :]]
    assert sum("\ufffd" in text for text in alone) >= 4  # each token for itself, the usual mistake
    growing, falling = [0.125 * 2**i for i in range(count)], [float(-i) for i in range(count)]
    seen_twice = [seen(encoded, growing), seen(encoded, falling)]
    made = disagreements("student", [row, row], [encoded, encoded], seen_twice, qwen)
    last, first = (one["tokens"] for one in made)
    assert [entry[0] for entry in last] == [entry[0] for entry in first] == ["鬱", " 🪿", "!", ""]
    # The KLs of its tokens are added up.
    assert last[-1][1] == growing[-1]
    assert sum(entry[1] for entry in last) == pytest.approx(sum(growing))
    # Both choices are read where the KL is highest: on the last token, behind the bytes before it ...
    assert last[0][3] == "鬱" and last[1][3] == "🪿"
    # ... or on the first, of which a character is not made yet.
    assert first[0][3].startswith("\\x") and first[1][3].startswith(" \\x")
    assert first[0][1] == 0  # no divergence is less than zero but by rounding


def test_the_rows_that_differ_most_come_first(tokenizer: Any) -> None:
    rows = [Row(prompt=f"question {i}", completion="answer" * (i + 1)) for i in range(5)]
    rows.append(Row(text="plain text"))
    encoded = [encode(row, tokenizer) for row in rows]
    found = [seen(one, kl) for one, kl in zip(encoded, [0.5, 2.0, 0.0, np.nan, 1.0, 3.0], strict=True)]
    made = disagreements("student-4bit", rows, encoded, found, tokenizer, most=4)
    assert [one["kl"] for one in made] == [3, 2, 1, 0.5]
    assert [one["prompt"] for one in made] == ["", "question 1", "question 4", "question 0"]
    assert {one["model"] for one in made} == {"student-4bit"}
    assert len(disagreements("student", rows, encoded, found, tokenizer)) == 5  # nan is no number
    none = [one._replace(kl=None, theirs=None) for one in found]
    assert disagreements("teacher", rows, encoded, none, tokenizer) == []


def test_what_fidelity_saw_is_what_is_listed(repository: Path) -> None:
    tokenizer = load_tokenizer(repository / "mlx_distill" / "assets" / "teacher", {"model_type": "none"})
    size = len(tokenizer)
    model, teacher = tiny_model(size, seed=1), tiny_model(size + 8, seed=2)
    rows = [Row(prompt="a", completion=text) for text in ("return x", "x", "def solve(x):\n    return x")]
    encoded = [encode(row, tokenizer) for row in rows]
    metrics, found = fidelity(model.model, encoded, size, teacher=LiveTeacher(teacher, size))
    made = disagreements("student", rows, encoded, found, tokenizer)
    counts = [len(one["tokens"]) for one in made]
    assert sum(one["kl"] * n for one, n in zip(made, counts, strict=True)) / sum(counts) == pytest.approx(
        metrics["kl"]
    )
    agree = sum(mine == theirs for one in made for _, _, mine, theirs in one["tokens"])
    assert agree / sum(counts) == pytest.approx(metrics["top1_agreement"], abs=1 / sum(counts))
    for one in made:
        assert sum(entry[1] for entry in one["tokens"]) == pytest.approx(
            one["kl"] * len(one["tokens"]), rel=1e-4
        )
    assert sorted("".join(entry[0] for entry in one["tokens"]) for one in made) == sorted(
        row.completion or "" for row in rows
    )


def test_tokenizers_whose_bytes_are_not_known_list_nothing() -> None:
    class Other:
        backend_tokenizer = None

    row = Encoded([1, 2, 3], 1)
    assert disagreements("student", [Row(prompt="a")], [row], [seen(row)], Other()) == []
