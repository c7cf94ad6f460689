"""Text that a model writes: greedy or sampled, many rows at a time, with mlx-lm's continuous batching."""

import hashlib
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_distill.keys import key_word
from mlx_distill.models.divided import together_of, writing
from mlx_distill.options import Sampling
from mlx_distill.progress import Progress, silent
from mlx_distill.sampling import Sampler


class Answer(NamedTuple):
    """What a model wrote for one prompt."""

    tokens: list[int]  # without the end-of-turn token
    finished: bool  # ended its turn itself, before `max_tokens`
    end: int | None = None  # the end-of-turn token that it wrote; None: unfinished


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    *,
    max_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    keys: Sequence[str] | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    title: str = "answers",
    progress: Progress = silent,
) -> list[Answer]:
    """Answer every prompt, in the order given.

    The random numbers of an answer are a function of the seed and its key alone, so batch size, order and
    neighbours leave it as it is. What they do change is how the products of matrices are rounded: two tokens
    that are equally good up to about 1e-6 may be taken for each other, greedily or sampled.
    docs/generation.md tells how often that was seen.

    Args:
        prompts: token ids; each at least one.
        stop: ids that end a turn.
        max_tokens: of an answer.
        batch_size: answers written at once.
        sampling: how tokens are drawn; None: always the likeliest.
        keys: one a prompt, all different; None: `keys_of(prompts)`.
        vocabulary: tokens from it on are never written; None: the model has no more than it knows.
        progress: its `advance` is also told the tokens a second, and how many answers are unfinished.
    """
    from mlx_lm.generate import BatchGenerator

    together = together_of(model)
    if together is not None and together.tell is not None and not together.writing:
        given = {"prompts": [list(prompt) for prompt in prompts], "stop": sorted(stop), "seed": seed}
        given |= {"max_tokens": max_tokens, "batch_size": batch_size, "vocabulary": vocabulary, "keys": keys}
        given["sampling"] = sampling and sampling.model_dump(include=set(Sampling.model_fields))

        def mine() -> list[Answer]:
            with writing(together):
                return generate(model, **arguments(given), title=title, progress=progress)

        return together.tell("write", given, b"", mine)
    model.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    sampler = Sampler(model, sampling or Sampling(), vocabulary)
    words = [key_word(seed, f"answer {key}") for key in (keys_of(prompts) if keys is None else keys)]
    called: Any = sampler
    # Ends are found here: for each row that mlx-lm sees end, it copies the caches of all others.
    generator = BatchGenerator(called, completion_batch_size=batch_size, prefill_batch_size=batch_size)
    # Gives back the wired limit that the constructor raised (reported kernel panics), and no more.
    generator.close()
    # Prompts of like length next to each other waste little padding in the prefill.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    row_of: dict[int, int] = {}
    written: dict[int, list[int]] = {}
    ended: list[int] = []
    started, total, unfinished = time.perf_counter(), 0, 0
    with progress(title, len(prompts), "rows") as advance:
        while waiting or written:
            # Rows that have ended write on, unread, until they are a quarter of the batch.
            if 3 * len(ended) >= len(written):
                generator.remove(ended)
                ended.clear()
                rows = [waiting.popleft() for _ in range(min(batch_size - len(written), len(waiting)))]
                if rows:
                    uids = generator.insert(
                        [list(prompts[row]) for row in rows],
                        max_tokens=[sys.maxsize] * len(rows),
                        caches=[sampler.cache(words[row], len(prompts[row])) for row in rows],
                    )
                    row_of |= zip(uids, rows, strict=True)
                    written |= {uid: [] for uid in uids}
            for uid, token in [(response.uid, response.token) for response in generator.next_generated()]:
                if uid not in written:
                    continue
                total += 1
                finished = token in stop
                if not finished:
                    written[uid].append(token)
                if finished or len(written[uid]) == max_tokens:
                    answers[row_of[uid]] = Answer(written.pop(uid), finished, token if finished else None)
                    ended.append(uid)
                    unfinished += not finished
                    speed = total / (time.perf_counter() - started)
                    advance(1, tokens_per_second=speed, **({"unfinished": unfinished} if unfinished else {}))
    if together is not None:  # the step begun ahead sends too, and must not meet what is sent next
        mx.synchronize(generator.stream)
    return [answer if answer is not None else Answer([], False) for answer in answers]


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from the plain values that another rank is told."""
    sampling = given["sampling"]
    options = None if sampling is None else Sampling.model_validate(sampling)
    return {**given, "stop": set(given["stop"]), "sampling": options}


def keys_of(prompts: Sequence[Sequence[int]]) -> list[str]:
    """A key for each answer: what its prompt says, and its number among the equal ones."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        said = hashlib.sha256(" ".join(map(str, prompt)).encode()).hexdigest()[:32]
        keys.append(f"{said} {seen[said]}")
        seen[said] += 1
    return keys
