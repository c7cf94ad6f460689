"""How many tokens of a big vocabulary a data set uses, and what other text costs without the rest.

    python benchmarks/vocabulary_bench.py path/to/qwen2.5 path/to/scitldr path/to/wikisql_mlx ...

Needs Qwen's tokenizer, and folders with `train.jsonl` and `test.jsonl`. For each: the tokens that
`student.prune.vocabulary` keeps for the training rows, seconds for that, how much longer the rows of
`test.jsonl` are in them, and the share of the weights of a Qwen2.5-0.5B that goes, computed from its config.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlx_distill  # noqa: F401 - before mlx.core: it puts a fast BLAS in front

# isort: split
from record import record

from mlx_distill import models
from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode
from mlx_distill.prune.axes import count_of
from mlx_distill.prune.vocabulary import learned_texts, trimmed, vocabulary_config
from mlx_distill.recipe import decode

END = "<|im_end|>"
MODEL = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 151_936,
}
RECIPE = {
    "name": "vocabulary",
    "student": {"prune": {"vocabulary": True}},
    "teacher": {"model": "embedded"},
    "data": {"train": "train.jsonl", "max_tokens": 1 << 20},
    "objective": {"forward_kl": {}},
    "train": {"steps": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data", type=Path, nargs="+")
    arguments = parser.parse_args()
    tokenizer = models.load_tokenizer(arguments.tokenizer, {"eos_token_id": None})
    assert tokenizer.eos_token == END, "the chats of another family end otherwise"
    lines = [line for folder in arguments.data for line in measured(tokenizer, folder)]
    record("vocabulary", lines)


def measured(tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    train, test = (read(folder / f"{split}.jsonl") for split in ("train", "test"))
    started = time.perf_counter()
    small, kept = trimmed(tokenizer, learned_texts(decode(RECIPE), {"train": train}, [], tokenizer))
    seconds = time.perf_counter() - started
    before, after = (sum(len(encode(row, one).tokens) for row in test) for one in (tokenizer, small))
    whole = count_of(MODEL)
    config = {"data": folder.name, "train rows": len(train), "test rows": len(test)}
    values = {
        "tokens kept": (len(kept), "tokens"),
        "share of the vocabulary": (len(kept) / len(tokenizer), "kept/all"),
        "longer test rows": (after / before - 1, "share of their tokens"),
        "weights of Qwen2.5-0.5B that go": (1 - count_of(vocabulary_config(MODEL, kept)) / whole, "share"),
        "time": (seconds, "s"),
    }
    return [
        {"name": f"{folder.name}: {name}", "value": value, "unit": unit, "config": config}
        for name, (value, unit) in values.items()
    ]


def read(path: Path) -> list[Row]:
    """Rows of a file in the forms of its data set: plain text, or a document and its summary."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        if "text" in told:
            rows.append(Row(text=told["text"]))
        else:
            [summary, *_] = told["summaries"] if "summaries" in told else [told["summary"]]
            rows.append(Row(prompt=told["document"], completion=summary))
    return rows


if __name__ == "__main__":
    main()
