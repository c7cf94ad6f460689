"""Off-policy against on-policy distillation, where mistakes of the student lead to more of them.

    python benchmarks/on_policy_bench.py --seeds 0 1 2
    python benchmarks/on_policy_bench.py --table

The task, a recital: a prompt gives a table of 6 keys with values, the answer recites it 4 times. In clean
rows the value of a key may be read in the table or in any earlier round, it is the same. Behind a mistake
only the table is right, and whoever reads in earlier rounds repeats the mistake. The teacher has learned it
from recitals with 3 of 10 values replaced, and reads in the table.

Every student sees the same clean rows first, for a short time, with forward_kl to the teacher. Then each arm
takes as many more updates: on clean rows (off-policy), on rows that it writes itself (on-policy), or on
both by turns. The first round is the control: it has no earlier one. Every finished run is kept in
results/on_policy.jsonl at once, and one that is there is not repeated.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx_distill  # before mlx.core: it puts a fast BLAS in front # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
from quiet import Quiet
from record import RESULTS, record

from mlx_distill import models, recipe
from mlx_distill.data.batch import Batch, Batches, Encoded, make_batch
from mlx_distill.evaluate.fidelity import fidelity
from mlx_distill.generate import generate
from mlx_distill.models import Loaded
from mlx_distill.on_policy import OwnRows
from mlx_distill.options import Sampling, Shape
from mlx_distill.recipe import Recipe
from mlx_distill.self_teacher import twin
from mlx_distill.teacher import LiveTeacher
from mlx_distill.train import HasBatches, train

KEYS, VALUES, ROUNDS = 6, 16, 4
GO, KEY, VALUE = 0, 1, 1 + KEYS  # tokens; key i is KEY + i
VOCABULARY = VALUE + VALUES
ROUND, PROMPT = 2 * KEYS, 2 * KEYS + 1  # tokens
ROWS, TEST, TOKENS = 1000, 300, 1600  # clean rows, test prompts, tokens of an update
TEACHER, START, MORE = 300, 120, 200  # updates

# name -> loss, share of own rows
ARMS: dict[str, tuple[str, float]] = {
    "off-policy, forward_kl": ("forward_kl", 0.0),
    "off-policy, reverse_kl": ("reverse_kl", 0.0),
    "half on-policy, forward_kl": ("forward_kl", 0.5),
    "half on-policy, reverse_kl": ("reverse_kl", 0.5),
    "on-policy, forward_kl": ("forward_kl", 1.0),
    "on-policy, reverse_kl": ("reverse_kl", 1.0),
}
BEFORE = "start, before the arms part"


def recital(random: np.random.Generator, disturbed: float = 0.0) -> tuple[list[int], list[bool]]:
    """A table and its recital, and which tokens are values that a disturbance put there."""
    table = [VALUE + int(value) for value in random.integers(VALUES, size=KEYS)]
    tokens = [token for key, value in enumerate(table) for token in (KEY + key, value)] + [GO]
    moved = [False] * len(tokens)
    for _ in range(ROUNDS):
        for key, value in enumerate(table):
            off = bool(random.random() < disturbed)
            tokens += [KEY + key, VALUE + int(random.integers(VALUES)) if off else value]
            moved += [False, off]
    return tokens, moved


class Disturbed:
    """Endless batches of disturbed recitals, of which only the undisturbed tokens are learned."""

    def __getitem__(self, index: int, /) -> Batch:
        random = np.random.default_rng([7, index])
        found = [recital(random, 0.3) for _ in range(TOKENS // 64)]
        batch = make_batch([Encoded(tokens, PROMPT) for tokens, _ in found])
        moved = np.zeros(batch.counted.shape, dtype=bool)
        for place, (_, off) in enumerate(found):
            moved[place, : len(off) - 1] = off[1:]
        counted = batch.counted & ~mx.array(moved)
        return batch._replace(counted=counted, weights=counted.astype(mx.float32))


class Later(NamedTuple):
    """The same batches from another place on."""

    batches: Batches
    start: int

    def __getitem__(self, index: Any, /) -> Any:
        return self.batches[self.start + index]


class Ids:
    """As much of a tokenizer as building a model takes."""

    eos_token_id, bos_token_id = GO, None

    def __len__(self) -> int:
        return VOCABULARY


def built(hidden: int, seed: int) -> Loaded:
    shape = Shape(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2, num_attention_heads=4
    )
    return models.build(shape, Ids(), seed)


def options(loss: str, steps: int, rate: float, seed: int, share: float = 0.0) -> Recipe:
    own = {"share": share, "max_tokens": ROUND * ROUNDS}
    return recipe.decode(
        {
            "name": "bench",
            "seed": seed,
            "student": {"model": "built here"},
            "teacher": None if loss == "cross_entropy" else {"model": "built here"},
            "data": {"train": "made here"},
            "generate": {"on_policy": own} if share else {},
            "objective": {loss: {}},
            "train": {
                "steps": steps,
                "batch_tokens": TOKENS,
                "learning_rate": rate,
                "warmup": 30,
                "beta2": 0.99,
                "log_every": 0,
                "save_every": 0,
            },
            "evaluate": {"tasks": []},
        }
    )


def fit(model: Any, teacher: LiveTeacher | None, batches: HasBatches, how: Recipe) -> float:
    """Train, and give the seconds that it took."""
    own, log = how.generate.on_policy, Quiet()
    writing = None
    if own is not None:
        asked = [recital(np.random.default_rng([how.seed, 1, i]))[0][:PROMPT] for i in range(ROWS)]
        writing = OwnRows(
            own,
            asked,
            steps=how.train.steps,
            batch_tokens=TOKENS,
            seed=how.seed,
            ends={GO},
            vocabulary=VOCABULARY,
        )
    quiet: Any = log
    teachers = [] if teacher is None else [teacher]
    return train(model, teachers, batches, how, VOCABULARY, quiet, own=writing).train_seconds


def right_values(prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """(ROUNDS,) share of the values of each round that are those of the table, at their places."""
    whole = [*answer, *[GO] * (ROUND * ROUNDS - len(answer))]
    values = np.array(whole[1::2]).reshape(ROUNDS, KEYS)
    return (values == np.array(prompt[1:-1:2])).mean(-1)


def measure(model: Any, teacher: LiveTeacher) -> dict[str, Any]:
    """What a model writes by itself, and what it makes of a mistake that is put into its mouth."""
    random = np.random.default_rng(12345)
    rows = [recital(random)[0] for _ in range(TEST)]
    found: dict[str, Any] = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        answers = generate(
            model,
            [row[:PROMPT] for row in rows],
            {GO},
            max_tokens=ROUND * ROUNDS,
            batch_size=TEST,
            sampling=Sampling(temperature=temperature),
            vocabulary=VOCABULARY,
        )
        each = [right_values(row[:PROMPT], answer.tokens) for row, answer in zip(rows, answers, strict=True)]
        found[name] = np.mean(each, axis=0).round(4).tolist()
    # The first three rounds give each key the same wrong value; the last is read on behind them.
    wrong = np.array(rows)
    first, last = slice(PROMPT + 1, PROMPT + 3 * ROUND, 2), slice(PROMPT + 3 * ROUND + 1, None, 2)
    shift = random.integers(1, VALUES, size=(TEST, KEYS))
    spoiled = VALUE + (wrong[:, 1 : PROMPT - 1 : 2] - VALUE + shift) % VALUES
    wrong[:, first] = np.tile(spoiled, 3)
    said = np.array(mx.argmax(model(mx.array(wrong[:, :-1]))[..., :VOCABULARY], axis=-1))
    found["behind_mistakes"] = float((said[:, PROMPT + 3 * ROUND :: 2] == wrong[:, last]).mean())
    clean = fidelity(model, [Encoded(row, PROMPT) for row in rows], VOCABULARY, teacher=teacher)[0]
    return found | {"kl": clean["kl"]}


def run(seed: int, teacher: LiveTeacher, known: set[tuple[str, int]]) -> None:
    """Every arm at one seed."""
    random = np.random.default_rng([seed, 2])
    rows = [Encoded(recital(random)[0], PROMPT) for _ in range(ROWS)]
    batches, student = Batches(rows, TOKENS, seed), built(32, seed)
    seconds = fit(student.model, teacher, batches, options("forward_kl", START, 4e-3, seed))
    keep(BEFORE, seed, seconds, student.model, teacher, known, [])
    for name, (loss, share) in ARMS.items():
        if (name, seed) not in known:
            model = twin(student.model)
            how = options(loss, MORE, 2e-3, seed, share)
            seconds = fit(model, teacher, Later(batches, START), how)
            keep(name, seed, seconds, model, teacher, known, [loss, share])


def keep(
    name: str,
    seed: int,
    seconds: float,
    model: Any,
    teacher: LiveTeacher,
    known: set[tuple[str, int]],
    arm: list[Any],
) -> None:
    if (name, seed) in known:
        return
    found = measure(model, teacher)
    line = {
        "name": name,
        "value": found["sampled"][-1],
        "unit": "share of right values in the last round",
        "config": {"seed": seed, "arm": arm, "start": START, "more": MORE, "batch_tokens": TOKENS},
        **found,
        "train_seconds": seconds,
    }
    record("on_policy", [line])


def kept() -> list[dict[str, Any]]:
    path = RESULTS / "on_policy.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def table() -> None:
    """Means over seeds with the smallest and largest value, in percent, as Markdown."""
    lines = kept()
    heads = [f"round {number + 1}" for number in range(ROUNDS)]
    print("| arm | " + " | ".join([*heads, "greedy, round 4", "behind mistakes", "kl", "time"]) + " |")
    print("|---" * (ROUNDS + 5) + "|")
    plain = {line["config"]["seed"]: line for line in lines if line["name"] == next(iter(ARMS))}
    for name in ("teacher", BEFORE, *ARMS):
        found = [line for line in lines if line["name"] == name]
        if not found:
            continue
        cells = [spread([100 * line["sampled"][number] for line in found]) for number in range(ROUNDS)]
        cells.append(spread([100 * line["greedy"][-1] for line in found]))
        cells.append(spread([100 * line["behind_mistakes"] for line in found]))
        cells.append(spread([line["kl"] for line in found], 4))
        times = [line["train_seconds"] / plain[line["config"]["seed"]]["train_seconds"] for line in found]
        cells.append("" if name not in ARMS else spread(times))
        print(f"| {name} | " + " | ".join(cells) + " |")


def spread(values: list[float], digits: int = 1) -> str:
    mean, low, high = (f(values) for f in (statistics.fmean, min, max))
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f} to {high:.{digits}f})" if high > low else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what is kept, and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        table()
        return
    mx.set_cache_limit(2 << 30)
    loaded, known = built(64, 1), {(line["name"], line["config"]["seed"]) for line in kept()}
    seconds = fit(loaded.model, None, Disturbed(), options("cross_entropy", TEACHER, 4e-3, 0))
    teacher = LiveTeacher(loaded, VOCABULARY)
    keep("teacher", 0, seconds, loaded.model, teacher, known, [])
    for seed in arguments.seeds:
        run(seed, teacher, known)


if __name__ == "__main__":
    main()
