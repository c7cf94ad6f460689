"""What it takes to check a model folder before its weights are read: headers, then a model without numbers.

    OPENBLAS_NUM_THREADS=1 python benchmarks/check_bench.py

Folders of a dense model of 32 billion weights and of a mixture of 128 experts of 30 billion are made with
real configs and headers, and with files that are holes: their size is right, and they take no room. Processor
time is told, median of five.
"""

import json
import math
import resource
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import record

import mlx_distill  # noqa: F401 - a fast BLAS, before mlx

# isort: split
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_distill.hub import model_folder
from mlx_distill.models import check_model

DENSE = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "norm_topk_prob": True,
}
FILES, REPEATS = 16, 5


def make(folder: Path, config: dict[str, Any]) -> tuple[int, float]:
    """Write a folder of this config; its tensors, and GiB in bfloat16."""
    model_class, arguments = _get_classes(config)
    parameters: Any = tree_flatten(model_class(arguments.from_dict(dict(config))).parameters())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    total = 0
    for number in range(FILES):
        header, end = {}, 0
        for name, array in parameters[number::FILES]:
            start, end = end, end + 2 * math.prod(array.shape)
            header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with open(folder / f"model-{number:05d}.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        total += end
    return len(parameters), total / 2**30


def main() -> None:
    lines = []
    with tempfile.TemporaryDirectory() as made:
        for name, config in (("dense", DENSE), ("experts", EXPERTS)):
            folder = Path(made) / name
            tensors, gib = make(folder, config)
            times = []
            for _ in range(REPEATS + 1):
                started = time.process_time()
                model_folder(str(folder), "teacher.model")
                check_model(folder, "teacher.model")
                times.append(time.process_time() - started)
            spread = [round(1000 * one, 1) for one in (min(times[1:]), max(times[1:]))]
            config = {"tensors": tensors, "gib": round(gib, 1), "files": FILES, "spread_ms": spread}
            milliseconds = round(1000 * statistics.median(times[1:]), 1)
            lines.append({"name": f"check_{name}", "value": milliseconds, "unit": "ms", "config": config})
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    lines.append({"name": "peak_of_the_process", "value": round(peak), "unit": "MiB", "config": {}})
    record("check", lines)


if __name__ == "__main__":
    main()
