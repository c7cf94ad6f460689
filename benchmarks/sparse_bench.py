"""Weights set to zero in the embedded teacher: what they cost, what they save, and what rounding leaves.

    OPENBLAS_NUM_THREADS=1 python benchmarks/sparse_bench.py [--rows 100] [--repeats 25]

Nothing is healed here. Each line names what was set to zero of every matrix in the layers.

- kl: to the dense model, on all labels of 100 held-out functions. Wanda reads the rows of the training split.
  `wanda in a matrix` compares Wanda's scores over a whole matrix, which no recipe can ask for.
- zeros kept: share of these zeros that a quantized matrix still gives exactly, after round-to-nearest.
- decode, size, gzip: half of the weights zero over dense. CPU time to write 64 tokens, both in turn in one
  process; bytes of `model.safetensors`; and its bytes after gzip.
"""

import argparse
import gzip
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx_distill  # noqa: F401 - before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from record import record

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.data.template import encode
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.models import Loaded
from mlx_distill.options import MODES, Sparsity
from mlx_distill.prune.importance import measure
from mlx_distill.prune.sparse import is_pruned, masks_of, smallest, sparsify, sparsity_of
from mlx_distill.teacher import LiveTeacher

TOKENS, PROMPT = 64, 32
WAYS = [(share, "unstructured") for share in (0.3, 0.5, 0.7)] + [(0.5, "2:4")]
GRIDS = [("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [
    (mode, *grid) for mode, grid in MODES.items()
]


def sparse(
    by: str = "magnitude", share: float = 0.5, pattern: str = "unstructured", rows: Any = ()
) -> Loaded:
    loaded = models.load("embedded", "model")
    options = Sparsity.model_validate({"by": by, "share": share, "pattern": pattern})
    statistics_of = measure(loaded, rows, 65536) if by == "wanda" else None
    return sparsify(loaded, options, statistics_of)


def kl(count: int) -> list[dict[str, Any]]:
    dense = models.load("embedded", "model")
    vocabulary = max(dense.tokenizer.get_vocab().values()) + 1
    learned, held_out = (
        [encode(row, dense.tokenizer, count="all") for row in pocket.rows("code", split, size)]
        for split, size in (("train", 300), ("test", count))
    )
    lines = []
    for share, pattern in WAYS:
        found = {by: sparse(by, share, pattern, learned) for by in ("magnitude", "wanda")}
        if pattern == "unstructured":
            found["wanda in a matrix"] = in_a_matrix(share, learned)
        for by, loaded in found.items():
            judge = LiveTeacher(dense, vocabulary)
            far = fidelity(loaded.model, held_out, vocabulary, teacher=judge)[0]["kl"]
            config = {"share": share, "pattern": pattern, "by": by, "sparsity": sparsity_of(loaded.model)}
            name = f"kl {by} {pattern} {share:g}"
            lines.append({"name": name, "value": far, "unit": "nats/token", "config": config})
    return lines


def in_a_matrix(share: float, rows: Any) -> Loaded:
    loaded = models.load("embedded", "model")
    sizes = measure(loaded, rows, 65536).inputs
    weights: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    for path, weight in weights.items():
        if is_pruned(path, weight.shape):
            scores = mx.abs(weight) * mx.array(np.sqrt(sizes[path.removesuffix(".weight")]), mx.float32)
            goes = smallest(scores.reshape(1, -1), round(share * weight.size)).reshape(weight.shape)
            loaded.model.load_weights([(path, mx.where(goes, 0, weight))], strict=False)
    return loaded


def zeros() -> list[dict[str, Any]]:
    lines = []
    for dtype in ("float32", "bfloat16"):
        for mode, bits, group_size in GRIDS:
            loaded = sparse()
            loaded.model.set_dtype(getattr(mx, dtype))
            masks, before = masks_of(loaded.model), sparsity_of(loaded.model)
            nn.quantize(loaded.model, group_size, bits, mode=mode)
            modules: dict[str, Any] = dict(loaded.model.named_modules())
            kept = count = 0
            grid: Any = {"group_size": group_size, "bits": bits, "mode": mode}
            for path, mask in masks.items():
                module = modules[path.removesuffix(".weight")]
                weight = mx.dequantize(module.weight, module.scales, module.get("biases"), **grid)
                gone = ~np.array(mask)
                kept += int((np.array(weight.astype(mx.float32))[gone] == 0).sum())
                count += int(gone.sum())
            config = {**grid, "dtype": dtype, "before": before, "after": sparsity_of(loaded.model)}
            name = f"zeros kept {mode} {bits} bits {dtype}"
            lines.append({"name": name, "value": kept / count, "unit": "share of zeros", "config": config})
    return lines


def decode(model: Any) -> float:
    """CPU seconds to write `TOKENS` tokens, which a busy machine leaves alone."""
    cache = make_prompt_cache(model)
    token = mx.argmax(model(mx.arange(2, PROMPT + 2)[None], cache=cache)[:, -1:], -1)
    mx.eval(token)
    start = time.process_time()
    for _ in range(TOKENS):
        token = mx.argmax(model(token, cache=cache)[:, -1:], -1)
        mx.eval(token)
    return time.process_time() - start


def cost(repeats: int) -> list[dict[str, Any]]:
    both = [models.load("embedded", "model"), sparse()]
    ratios = []
    for number in range(repeats + 1):  # the first to warm up
        times = [decode(one.model) for one in (both if number % 2 else both[::-1])]
        ratios.append(times[1] / times[0] if number % 2 else times[0] / times[1])
    spread = [float(np.quantile(ratios[1:], q)) for q in (0.25, 0.75)]
    sizes = []
    for loaded in both:
        with tempfile.TemporaryDirectory() as folder:
            models.save(Path(folder), loaded)
            data = (Path(folder) / "model.safetensors").read_bytes()
            sizes.append((len(data), len(gzip.compress(data))))
    config = {"share": 0.5, "by": "magnitude", "dtype": "float32"}
    timing = {**config, "tokens": TOKENS, "repeats": repeats, "quartiles": spread}
    unit = "sparse/dense"
    (size, packed), (sparse_size, sparse_packed) = sizes
    return [
        {"name": "decode time", "value": statistics.median(ratios[1:]), "unit": unit, "config": timing},
        {"name": "size", "value": sparse_size / size, "unit": unit, "config": config},
        {"name": "gzip", "value": sparse_packed / packed, "unit": unit, "config": config},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    lines = [*kl(options.rows), *zeros(), *cost(options.repeats)]
    record("sparse", lines)


if __name__ == "__main__":
    main()
