"""How fast the embedded teacher answers by batch size, greedy and sampled; whether batches change answers.

    OPENBLAS_NUM_THREADS=1 python benchmarks/generate_bench.py [--repeats 5] [--answers 2000]

`batch32_speedup` is the tokens a second at batch 32 over those one by one, sampled at temperature 1 with
top-k 20 and top-p 0.8; reading the prompts counts as time, the end-of-turn token as a token.
`sampling_cost` is the time of a sampled token over that of a greedy one at batch 32. `answers that differ`
counts, of as many answers as asked for, those that are not the same token for token at another batch size as
at 32, drawn at temperature 1 from all tokens. The variants run in turn in one process, after a warm-up; on a
CPU the time is that of the processor. A ratio is the median over rounds, its spread the smallest and largest.
"""

import argparse
import statistics
import sys
import time
from typing import Any

from record import record

import mlx_distill  # before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx

from mlx_distill import models
from mlx_distill.data import pocket
from mlx_distill.data.template import encode_prompt, end_of_turn_ids
from mlx_distill.generate import Answer, generate
from mlx_distill.models import Loaded
from mlx_distill.options import Sampling

WAYS = {"sampled": Sampling(temperature=1.0, top_k=20, top_p=0.8), "greedy": Sampling()}
PROMPTS = {1: 24, 32: 256, 8: 64, 128: 512}  # by batch size: a whole number of batches, in about a second
MAX_TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--answers", type=int, default=2000)
    arguments = parser.parse_args()
    if mx.default_device() == mx.cpu:
        mx.set_cache_limit(2 << 30)  # as in a run on a CPU
    teacher = models.load("embedded", "teacher.model")
    rows = pocket.rows("both", "train", max(*PROMPTS.values(), arguments.answers))
    prompts = [encode_prompt(row, teacher.tokenizer) for row in rows]
    lines = speeds(teacher, prompts, arguments.repeats) + differences(teacher, prompts[: arguments.answers])
    record("generate", lines)


def write(teacher: Loaded, prompts: list[list[int]], batch_size: int, sampling: Sampling) -> list[Answer]:
    stop = end_of_turn_ids(teacher.tokenizer)
    how: dict[str, Any] = {"max_tokens": MAX_TOKENS, "batch_size": batch_size, "sampling": sampling}
    return generate(teacher.model, prompts, stop, **how)


def speeds(teacher: Loaded, prompts: list[list[int]], repeats: int) -> list[dict[str, Any]]:
    """Tokens a second of each way at each batch size, and their ratios round by round."""
    clock = time.process_time if mx.default_device() == mx.cpu else time.perf_counter
    found: dict[tuple[str, int], list[float]] = {(way, size): [] for size in PROMPTS for way in WAYS}
    for turn in range(repeats + 1):  # the first warms up
        for (way, size), values in found.items():
            before = clock()
            answers = write(teacher, prompts[: PROMPTS[size]], size, WAYS[way])
            seconds = clock() - before
            if turn:
                values.append(sum(len(a.tokens) + a.finished for a in answers) / seconds)
        print(f"round {turn} of {repeats}", file=sys.stderr, flush=True)

    def ratio(name: str, above: tuple[str, int], below: tuple[str, int], unit: str) -> dict[str, Any]:
        return line(name, [a / b for a, b in zip(found[above], found[below], strict=True)], unit)

    lines = [
        ratio("batch32_speedup", ("sampled", 32), ("sampled", 1), "tokens/s, batch 32/one by one"),
        ratio("batch32_speedup, greedy", ("greedy", 32), ("greedy", 1), "tokens/s, batch 32/one by one"),
        ratio("sampling_cost", ("greedy", 32), ("sampled", 32), "time a token, sampled/greedy"),
    ]
    lines += [line(f"batch {size}, {way}", values, "tokens/s") for (way, size), values in found.items()]
    config = {"sampled": WAYS["sampled"].model_dump(), "prompts": PROMPTS, "repeats": repeats}
    return [{**one, "config": {**config, "blas": mlx_distill.BLAS}} for one in lines]


def line(name: str, values: list[float], unit: str) -> dict[str, Any]:
    spread = [min(values), max(values)]
    return {"name": name, "value": statistics.median(values), "spread": spread, "unit": unit}


def differences(teacher: Loaded, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """How many answers another batch size changes."""
    plain = Sampling(temperature=1.0)
    expected = write(teacher, prompts, 32, plain)
    tokens = sum(len(answer.tokens) + answer.finished for answer in expected)
    lines = []
    for size in (1, 7):
        found = write(teacher, prompts, size, plain)
        count = sum(one != other for one, other in zip(found, expected, strict=True))
        config = {"tokens": tokens, "temperature": 1.0, "blas": mlx_distill.BLAS}
        name, unit = f"answers that differ, batch {size} from 32", f"of {len(prompts)}"
        lines.append({"name": name, "value": count, "unit": unit, "config": config})
    return lines


if __name__ == "__main__":
    main()
