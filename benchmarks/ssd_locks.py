"""Self-distillation of a learned model where the mechanism is at work: strings of the toy's automaton.

A network of 20,000 weights learns strings that the automaton of ssd_toy.py writes, which a wrong token ends.
It then writes strings of its own with `mlx_distill.generate` and learns them with `mlx_distill.train`. Its
chance of a right string is computed from its probabilities behind the nine beginnings of right strings, so
nothing is sampled in the evaluation.
"""

from typing import Any

import mlx_distill  # before mlx.core: it puts a fast BLAS in front # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
from quiet import Quiet
from ssd_toy import BASE, TOKENS, TOP_P, Best, States

from mlx_distill import models, recipe
from mlx_distill.data.batch import Batches, Encoded
from mlx_distill.generate import generate
from mlx_distill.keys import generator
from mlx_distill.models import Loaded
from mlx_distill.options import Sampling, Shape
from mlx_distill.recipe import Recipe
from mlx_distill.sampling import distribution
from mlx_distill.train import train

END, START, VOCABULARY, LOCKS = TOKENS, TOKENS + 1, TOKENS + 2, 3  # ids behind the automaton's own
STRINGS, BASE_STEPS, SAMPLES, STEPS, ROWS = 10_000, 500, 5_000, 400, 64
TEMPERATURES = np.round(np.arange(0.05, 3.005, 0.01), 2).tolist()
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


class Ids:
    """As much of a tokenizer as building a model takes."""

    eos_token_id, bos_token_id = END, None

    def __len__(self) -> int:
        return VOCABULARY


def strings(count: int, seed: int, states: States = BASE) -> list[Encoded]:
    """Strings of the automaton, each behind the start token; the end token closes all."""
    random = generator(seed, "strings")
    found = []
    for _ in range(count):
        tokens = [START, int(random.choice(TOKENS, p=states.root))]
        if tokens[-1] < 2:
            tokens.append(int(random.choice(TOKENS, p=states.fork)))
            while tokens[-1] == 0 and len(tokens) < 3 + LOCKS:
                tokens.append(int(random.choice(TOKENS, p=states.lock)))
        found.append(Encoded([*tokens, END], 1))
    return found


def learn(loaded: Loaded, rows: list[Encoded], steps: int, rate: float, seed: int) -> None:
    """Plain cross entropy on these rows."""
    width = 32  # tokens that a row takes in a batch
    log: Any = Quiet()
    how = options(steps, rate, ROWS * width, seed)
    train(loaded.model, [], Batches(rows, ROWS * width, seed), how, VOCABULARY, log)


def options(steps: int, rate: float, batch_tokens: int, seed: int) -> Recipe:
    return recipe.decode(
        {
            "name": "locks",
            "seed": seed,
            "student": {"shape": SHAPE, "tokenizer": {"pieces": VOCABULARY}},
            "data": {"train": "strings.jsonl"},
            "objective": {"cross_entropy": {}},
            "train": {
                "steps": steps,
                "batch_tokens": batch_tokens,
                "learning_rate": rate,
                "warmup": 20,
                "compile": False,
                "log_every": 0,
                "save_every": 0,
            },
        }
    )


def base(seed: int) -> Loaded:
    """A network that has learned strings of the automaton."""
    loaded = models.build(Shape(**SHAPE), Ids(), seed)
    learn(loaded, strings(STRINGS, seed), BASE_STEPS, 3e-3, seed)
    return loaded


def copy(loaded: Loaded) -> Loaded:
    twin = models.build(Shape(**SHAPE), Ids(), 0)
    twin.model.update(loaded.model.parameters())
    return twin


def distilled(loaded: Loaded, sampling: Sampling, seed: int) -> tuple[Loaded, int]:
    """A copy of the network that has learned its own strings, and how many of these ended."""
    prompts = [[START]] * SAMPLES
    answers = generate(
        loaded.model, prompts, {END}, max_tokens=6, batch_size=500, sampling=sampling, seed=seed
    )
    rows = [Encoded([START, *answer.tokens, END], 1) for answer in answers if answer.finished]
    student = copy(loaded)
    learn(student, rows, STEPS, 2e-3, seed)
    return student, len(rows)


def best(loaded: Loaded, top_p: float = TOP_P) -> Best:
    """The best temperature and the chance of a right string there, exact."""
    prefixes = [[START], *([START, way, *[0] * n] for way in (0, 1) for n in range(LOCKS + 1))]
    logits: list[mx.array] = []
    loaded.model.eval()
    for prefix in prefixes:
        logits.append(loaded.model(mx.array([prefix]))[0, -1].astype(mx.float32))
    stacked, found = mx.stack(logits), []
    for temperature in TEMPERATURES:
        log_q = distribution(stacked, Sampling(temperature=temperature, top_p=top_p))
        q = np.array(mx.exp(log_q), dtype=np.float64)
        after = q[1:, 0].reshape(2, LOCKS + 1).prod(-1)  # the fork, then the locks, by both ways
        found.append(Best(float(q[0, :2] @ after), temperature))
    return max(found)
