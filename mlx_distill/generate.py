"""Text that a model writes: greedy, many rows at a time, with mlx-lm's continuous batching."""

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import mlx.nn as nn

from mlx_distill.progress import Progress, silent


class Answer(NamedTuple):
    """What a model wrote for one prompt."""

    tokens: list[int]  # without the end-of-turn token
    finished: bool  # ended its turn itself, before `max_tokens`


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    *,
    max_tokens: int,
    batch_size: int,
    title: str = "answers",
    progress: Progress = silent,
) -> list[Answer]:
    """Answer every prompt greedily, in the order given.

    Args:
        prompts: token ids; each at least one.
        stop: ids that end a turn.
        max_tokens: of an answer.
        batch_size: answers written at once.
    """
    from mlx_lm.generate import BatchGenerator

    model.eval()
    answers: list[Answer | None] = [None] * len(prompts)
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in sorted(stop)],
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    # Gives back the wired limit that the constructor raised (reported kernel panics), and no more.
    generator.close()
    # Prompts of like length next to each other waste little padding in the prefill.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    row_of: dict[int, int] = {}
    written: dict[int, list[int]] = {}
    started, total = time.perf_counter(), 0
    with progress(title, len(prompts), "rows") as advance:
        while waiting or written:
            # mlx-lm prefills whatever waits, and copies all caches, at each step with a free place;
            # letting a quarter of the places come free first is a quarter faster for short answers.
            if waiting and len(written) <= batch_size * 3 // 4:
                rows = [waiting.popleft() for _ in range(min(batch_size - len(written), len(waiting)))]
                uids = generator.insert([list(prompts[row]) for row in rows])
                row_of |= zip(uids, rows, strict=True)
                written |= {uid: [] for uid in uids}
            responses = generator.next_generated()
            total += len(responses)
            for response in responses:
                if response.finish_reason != "stop":
                    written[response.uid].append(response.token)
                if response.finish_reason is not None:
                    tokens = written.pop(response.uid)
                    answers[row_of[response.uid]] = Answer(tokens, response.finish_reason == "stop")
                    advance(1, tokens_per_second=total / (time.perf_counter() - started))
    return [answer if answer is not None else Answer([], False) for answer in answers]
