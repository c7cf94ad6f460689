"""Off-policy against on-policy distillation, where a student drifts into states that no data show.

    python benchmarks/on_policy_bench.py --seeds 0 1 2
    python benchmarks/on_policy_bench.py --table

The task, a walk: a prompt gives a place on a line of 32 and up to 8 goals; the answer names each goal, walks
to it in steps of 1 to 3 (which of them is left to chance), rings a bell on it, and ends after the last. Whoever
steps past a goal has to turn round. No clean walk shows that; the teacher has learned it from disturbed ones.

All students see the same clean walks of 1 to 8 goals first, with forward_kl to the teacher. Then one goes on
with them (off-policy), others learn from what they write themselves. Counted are walks that succeed, and steps
that are right where they are taken, wherever earlier ones led. Every finished run is kept in
results/on_policy.jsonl at once, and one that is there is not repeated.
"""

from typing import Any

import mlx_distill  # before mlx.core: it puts a fast BLAS in front # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np

from mlx_distill.data.batch import Batch, Encoded, make_batch
from mlx_distill.interrupt import Interrupts
from mlx_distill.options import Shape
from mlx_distill.recipe import Recipe
from mlx_distill.run import Counters

KEYS, VALUES, ROUNDS = 6, 16, 4
GO, KEY, VALUE = 0, 1, 1 + KEYS  # tokens; key i is KEY + i
VOCABULARY = VALUE + VALUES
LENGTH, PROMPT = 2 * KEYS * ROUNDS, 2 * KEYS + 1


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


def right_values(prompt: list[int], answer: list[int]) -> list[bool]:
    """Whether each token is the right one behind those before it, wherever these led: a key, then its value."""
    table, before, right = dict(zip(prompt[:-1:2], prompt[1:-1:2], strict=True)), KEY + KEYS - 1, []
    key = None
    for token in answer:
        if key is None:
            right.append(token == KEY + (before - KEY + 1) % KEYS)
            key = token if token in table else None
            before = token if token in table else before
        else:
            right.append(token == table[key])
            key = None
    return right


class Disturbed:
    """Endless batches of disturbed walks, of which only the steps of the walker itself are learned."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed = rows, seed

    def __getitem__(self, index: int, /) -> Batch:
        random = np.random.default_rng([self.seed, index])
        walks = [recital(random, 0.3) for _ in range(self.rows)]
        batch = make_batch([Encoded(tokens, PROMPT) for tokens, _ in walks])
        moved = np.zeros(batch.counted.shape, dtype=bool)
        for place, (_, off) in enumerate(walks):
            moved[place, : len(off) - 1] = off[1:]
        counted = batch.counted & ~mx.array(moved)
        return batch._replace(counted=counted, weights=counted.astype(mx.float32))


class Ids:
    """As much of a tokenizer as building a model takes."""

    eos_token_id, bos_token_id = GO, None

    def __len__(self) -> int:
        return VOCABULARY


class Quiet:
    """A stage log that keeps nothing but the last means."""

    stage, interrupts = "student", Interrupts()

    def steps(self, first: int, last: int) -> range:
        return range(first, last + 1)

    def restore(self, *_: Any) -> Counters:
        return Counters()

    def metrics(self, counters: Counters, how: Recipe, *_: Any) -> None:
        print(counters.step, counters.means(how), counters.own_means(), round(counters.seconds,1), flush=True)
        counters.close_window()

    def save(self, *_: Any) -> None: ...

    def say(self, line: str) -> None: ...


def shape(hidden: int, layers: int) -> Shape:
    return Shape(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4
    )
