"""The teacher cache: bytes a counted token, the KL they add, the time to read, and what students lose.

    OPENBLAS_NUM_THREADS=1 python benchmarks/cache_bench.py stored [--places 8192]
    OPENBLAS_NUM_THREADS=1 python benchmarks/cache_bench.py read
    OPENBLAS_NUM_THREADS=1 python benchmarks/cache_bench.py students --seeds 0 1 2 [--steps 300]
    python benchmarks/cache_bench.py --table

- stored: real cache folders, all their files counted, the manifest and the numbering of tokens included.
  The teachers: `zipf` and `uniform` over a vocabulary of 151,936, whose logits at a place are the
  logarithm of the frequency (1/rank, or alike for all) plus Gumbel noise of its own, times a sharpness
  between 1 and 3; and the embedded one, at the labels of its answers, of which it is nearly certain, and at
  all labels. The KL is that of the exact k + 1 outcomes from the stored ones.
  Raw is what the k likeliest take as int32 and float32, and the tail as float32.
- read: seconds to read and unpack the targets of a batch over those of a whole step, with the quickstart's
  student, batches and teacher. In the loop's own thread: a run reads ahead in another, and waits for less.
- students: the quickstart's student, trained on all labels of 3,000 functions by forward KL alone, from
  whole distributions, the top k in float32, the top k in few bits, and drawn tokens: its KL to the teacher
  on all labels of 150 functions of the held-out split. A run that is kept in results/cache.jsonl is not
  repeated.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import mlx_distill  # before mlx.core: it puts a fast BLAS in front

# isort: split
import mlx.core as mx
import numpy as np
from quiet import Quiet
from record import RESULTS, record

from mlx_distill import models, recipe
from mlx_distill.bundled import find_recipe
from mlx_distill.cache import CachedTeacher, Store, capture, described, write_cache
from mlx_distill.cache.records import pack
from mlx_distill.cache.tokens import TokenCode
from mlx_distill.data import pocket
from mlx_distill.data.batch import Batch, Batches, Encoded, counted_places
from mlx_distill.data.template import encode
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.losses import Targets
from mlx_distill.optimizer import make_optimizer
from mlx_distill.recipe import Recipe
from mlx_distill.student import make_student
from mlx_distill.teacher import LiveTeacher, Teaches
from mlx_distill.train import make_objective, make_step, train

VOCABULARY, ROW = 151_936, 256  # of the teachers that are made up; counted labels of each of their rows
KEPT = (8, 16, 32, 50, 64, 128)
FEW = (8, 16, 32, 64, 128)  # of which students learn
DRAWN = 50
Count = Literal["completion", "all"]  # labels that are counted


class Noise:
    """A teacher over a real vocabulary that says what chance has it say, its tokens in random order."""

    vocabulary = VOCABULARY

    def __init__(self, kind: str):
        ranks = np.random.default_rng(0).permutation(VOCABULARY) + 1.0
        self.frequency = mx.array(
            -np.log(ranks) if kind == "zipf" else np.zeros(VOCABULARY), dtype=mx.float32
        )
        self.key, self.head = mx.random.key(1), self

    def targets(self, batch: Batch) -> Targets:
        places = counted_places(batch)[None]
        return Targets(places, last=places)

    def logits(self, places: mx.array) -> mx.array:
        self.key, one, other = mx.random.split(self.key, 3)
        noise = mx.random.gumbel((*places.shape, VOCABULARY), key=one)
        return mx.random.uniform(1, 3, (*places.shape, 1), key=other) * (self.frequency + noise)


def stored(places: int) -> None:
    lines: list[dict[str, Any]] = []
    for kind in ("zipf", "uniform"):
        teacher: Any = Noise(kind)
        rows = [Encoded([i, *range(2, ROW + 2)], 1) for i in range(places // ROW)]
        lines += sizes(kind, teacher, rows, KEPT)
    counted: dict[str, Count] = {"embedded": "completion", "embedded, all": "all"}
    for kind, count in counted.items():
        loaded, rows, _ = embedded(1000, count=count)
        lines += sizes(kind, LiveTeacher(loaded, vocabulary_of(loaded)), rows, KEPT)
    for line in [line for line in lines if line["name"].endswith(" k 50")]:
        short = line["name"].removesuffix(" k 50")
        for name, kind in (("bytes_per_token_k50", "bytes"), ("cache_kl_k50", "kl")):
            if short == f"{kind} zipf":
                lines.append({**line, "name": name})
            elif short == f"{kind} uniform":
                lines.append({**line, "name": f"{name}_uniform"})
    record("cache", lines)


def sizes(kind: str, teacher: Any, rows: list[Encoded], kept: tuple[int, ...]) -> list[dict[str, Any]]:
    """Bytes and KL at each k, of one reading of the rows at the largest of them."""
    how = {"vocabulary": teacher.vocabulary, "precision": "compact"}
    shards = [
        (shard, capture._read(teacher, shard, described(top_k=max(kept), **how), lambda *_: None))
        for shard in capture._shards(rows)
    ]
    lines = []
    for k in kept:
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "cache", described(top_k=k, **how))
            for shard, whole in shards:
                raw = cut(whole, k)
                if store.code is None:
                    store.number_tokens(TokenCode.of(raw["indices"], teacher.vocabulary))
                assert store.code is not None
                store.add(*pack(raw, shard, store.code, "compact"))
            told = [store.file(number).manifest() for number in store.numbers()]
            count = sum(one["places"] for one in told)
            size, table = store.size() / count, (store.folder / "tokens.safetensors").stat().st_size
        mean = sum(one["kl_mean"] * one["places"] for one in told) / count
        config = {
            "teacher": kind,
            "vocabulary": teacher.vocabulary,
            "k": k,
            "places": count,
            "raw": 8 * k + 4,
            "numbering_of_tokens_bytes": table,
            "kl_max": max(one["kl_max"] for one in told),
            "top_k_mass": float(np.mean([np.exp(cut(w, k)["log_p"]).sum(-1).mean() for _, w in shards])),
        }
        print(kind, k, round(size, 1), "bytes", f"{mean:.1e}", "nats", file=sys.stderr, flush=True)
        unit = "bytes/counted token, all files"
        lines.append({"name": f"bytes {kind} k {k}", "value": size, "unit": unit, "config": config})
        lines.append(
            {"name": f"kl {kind} k {k}", "value": mean, "unit": "nats/token, mean", "config": config}
        )
    return lines


def cut(raw: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """The k likeliest of those that were kept; the others join the tail."""
    order = np.argsort(-raw["log_p"], axis=-1)
    sort = {name: np.take_along_axis(raw[name], order, axis=-1) for name in ("indices", "log_p")}
    rest = np.exp(raw["log_tail"].astype(np.float64)) + np.exp(sort["log_p"][:, k:].astype(np.float64)).sum(
        -1
    )
    tail = np.log(np.maximum(rest, 1e-300)).astype(np.float32)
    return {"indices": sort["indices"][:, :k], "log_p": sort["log_p"][:, :k], "log_tail": tail}


def vocabulary_of(loaded: models.Loaded) -> int:
    return max(loaded.tokenizer.get_vocab().values()) + 1


def embedded(
    rows: int, seed: int = 0, count: Count = "completion"
) -> tuple[models.Loaded, list[Encoded], list[Encoded]]:
    """The embedded teacher, rows to learn from and rows to be measured on."""
    loaded = models.load("embedded", "teacher.model")
    drawn = pocket.rows("code", "train", rows, seed=seed + 1), pocket.rows("code", "test", 150)
    learned, test = ([encode(row, loaded.tokenizer, count=count) for row in part] for part in drawn)
    return loaded, learned, test


def quickstart(*overrides: str) -> Recipe:
    fixed = ["train.log_every=0", "train.save_every=0", "train.eval_every=0", "data.prompts=null"]
    return recipe.load(find_recipe("quickstart"), [*fixed, *overrides])


def read(repeats: int) -> None:
    """Share of a step that reading takes; both in turn, in one process."""
    loaded, rows, _ = embedded(1000)
    vocabulary, lines = vocabulary_of(loaded), list[dict[str, Any]]()
    live = LiveTeacher(loaded, vocabulary)
    for k in (50, 64):
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder) / "cache"
            write_cache(at, live, rows, made_of={}, top_k=k, precision="compact")
            lines += shares(k, CachedTeacher(at, rows, {}), rows, vocabulary, repeats)
    record("cache", lines)


def shares(k: int, cached: CachedTeacher, rows: list[Encoded], vocabulary: int, repeats: int) -> Any:
    how = quickstart("teacher.source=cache", f"teacher.top_k={k}")
    batches = Batches(rows, how.train.batch_tokens, 0)
    loaded = models.load("embedded", "teacher.model")
    student = make_student(how.student, loaded.tokenizer, 0).model
    student.train()
    optimizer = make_optimizer(how.train)
    optimizer.init(student.trainable_parameters())
    functions = make_step(make_objective(student, [cached], how, vocabulary), optimizer, how)

    def step(batch: Batch, targets: Targets) -> None:
        sums, parts = functions.gradients(batch, [targets], {})
        size = functions.update(sums, batch.weights.sum(-1).sum(), parts)
        mx.eval(student.state, optimizer.state, parts, size)

    seconds: dict[str, list[float]] = {"read": [], "step": []}

    def timed(name: str, work: Callable[[], Any]) -> None:
        started = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - started)

    for i in range(repeats + 3):
        batch = batches[i]
        timed("read", lambda batch=batch: mx.eval(cached.targets(batch)))
        timed("step", lambda batch=batch: step(batch, cached.targets(batch)))
    medians = {name: statistics.median(values[3:]) for name, values in seconds.items()}
    batch = batches[0]
    config = {
        "k": k,
        "seconds": medians,
        "counted_in_a_batch": int(batch.counted.sum()),
        "batch_tokens": how.train.batch_tokens,
        "repeats": repeats,
        "blas": mlx_distill.BLAS,
    }
    print(config, file=sys.stderr, flush=True)
    suffix = "" if k == 64 else f", k {k}"
    value = medians["read"] / medians["step"]
    return [{"name": f"cache_read_share{suffix}", "value": value, "unit": "read/step", "config": config}]


def kinds() -> dict[str, tuple[dict[str, Any] | None, str]]:
    """What a student learns from -> what is stored, and the options of the teacher."""
    found: dict[str, tuple[dict[str, Any] | None, str]] = {"whole distributions": (None, "{model: embedded}")}
    for k in FEW:
        for precision in ("exact", "compact"):
            said = f"{{model: embedded, source: cache, top_k: {k}, precision: {precision}}}"
            found[f"top {k}, {precision}"] = {"top_k": k, "precision": precision}, said
    said = f"{{model: embedded, source: cache, sampled: {DRAWN}}}"
    return {**found, f"{DRAWN} drawn": ({"sampled": DRAWN}, said)}


def students(seeds: list[int], steps: int) -> None:
    known = {(line["name"], line["config"].get("seed"), line["config"].get("steps")) for line in kept_lines()}
    for seed in seeds:
        loaded, rows, test = embedded(3000, seed, "all")
        vocabulary = vocabulary_of(loaded)
        judging = LiveTeacher(loaded, vocabulary)
        for kind, (stored_as, said) in kinds().items():
            if (f"student's kl, {kind}", seed, steps) in known:
                continue
            how = quickstart(
                f"teacher={said}",
                "objective={forward_kl: {}}",
                f"train.steps={steps}",
                f"seed={seed}",
            )
            folder = Path(tempfile.mkdtemp())
            taught: Teaches = judging
            if stored_as is not None:
                write_cache(folder / "cache", judging, rows, made_of={}, seed=seed, **stored_as)
                taught = CachedTeacher(folder / "cache", rows, {})
            student = make_student(how.student, loaded.tokenizer, seed)
            log: Any = Quiet()
            started = time.perf_counter()
            train(student.model, [taught], Batches(rows, how.train.batch_tokens, seed), how, vocabulary, log)
            found = fidelity(student.model, test, vocabulary, teacher=judging)[0]
            shutil.rmtree(folder)
            config = {
                "seed": seed,
                "steps": steps,
                "batch_tokens": how.train.batch_tokens,
                "nll": found["nll"],
                "top1_agreement": found["top1_agreement"],
                "ece": found["ece"],
                "seconds": time.perf_counter() - started,
            }
            record(
                "cache",
                [
                    {
                        "name": f"student's kl, {kind}",
                        "value": found["kl"],
                        "unit": "nats/token",
                        "config": config,
                    }
                ],
            )


def kept_lines() -> list[dict[str, Any]]:
    path = RESULTS / "cache.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def table() -> None:
    """What is kept, the last of each, as Markdown."""
    last = {line["name"]: line for line in kept_lines()}
    print("| k | raw | zipf: bytes, KL (max) | uniform | embedded | all |\n|---|---|---|---|---|---|")
    for k in KEPT:
        cells = []
        for kind in ("zipf", "uniform", "embedded", "embedded, all"):
            one, other = last.get(f"bytes {kind} k {k}"), last.get(f"kl {kind} k {k}")
            if one is not None and other is not None:
                cells.append(f"{one['value']:.1f}, {other['value']:.1e} ({other['config']['kl_max']:.1e})")
        print(f"| {k} | {8 * k + 4} | " + " | ".join(cells) + " |")
    print("\n| learned from | KL to the teacher | seeds |\n|---|---|---|")
    for kind in kinds():
        found = [line for line in kept_lines() if line["name"] == f"student's kl, {kind}"]
        values = [line["value"] for line in found]
        if values:
            mean = statistics.fmean(values)
            print(f"| {kind} | {mean:.4f} ({min(values):.4f} to {max(values):.4f}) | {len(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("stored", "read", "students"))
    parser.add_argument("--places", type=int, default=8192, help="counted labels of the teachers made up")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--table", action="store_true", help="print what is kept, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    if mx.default_device() == mx.cpu:
        mx.set_cache_limit(2 << 30)  # as in training on a CPU
    if arguments.what == "stored":
        stored(arguments.places)
    elif arguments.what == "read":
        read(arguments.repeats)
    elif arguments.what == "students":
        students(arguments.seeds, arguments.steps)
    else:
        parser.error("name what to measure, or --table")


if __name__ == "__main__":
    main()
