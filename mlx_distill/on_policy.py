"""On-policy distillation: the student learns from its own answers, judged by the live teacher.

One draw a micro-batch says whose rows it holds: with probability `share` the student's, written at its
weights of that moment, else the data's (GKD, Agarwal et al. 2023, arXiv 2306.13649, algorithm 1). No
gradient goes through the writing. See docs/on_policy.md.
"""

import math
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import mlx.nn as nn

from mlx_distill.data.batch import PAD_TO, Batch, Encoded, make_batch
from mlx_distill.distributed import ALONE, Ranks
from mlx_distill.generate import Answer, generate
from mlx_distill.keys import generator
from mlx_distill.length_alarm import LengthAlarm
from mlx_distill.options import OnPolicy

WIDTHS = 8  # how many widths own answers are padded to: each is one more trace of a compiled step
RISE = 0.1  # nats of validation loss at which the adaptive share rises, and by how much it does (DistiLLM)


class OwnBatch(NamedTuple):
    """A micro-batch of rows that the student wrote."""

    batch: Batch
    answers: list[Answer]  # written for it just now; [] where they come from the buffer

    @property
    def counts(self) -> dict[str, int]:
        """For the log: answers, their tokens without the ends of turns, and how many have no end."""
        return {
            "own": 1,
            "answers": len(self.answers),
            "tokens": sum(len(answer.tokens) for answer in self.answers),
            "unfinished": sum(not answer.finished for answer in self.answers),
        }


class OwnRows:
    """Micro-batches of the student's own rows, for a run that mixes them into those of the data.

    Micro-batch i is a function of the seed, i, the weights, and the state that `state` gives.

    Args:
        questions: token ids that the student is asked; each at least one.
        steps: of the training.
        batch_tokens: of a micro-batch, padding included, if every answer is as long as it may be.
        ends: ids that end a turn.
        vocabulary: ids from there on only pad the student's matrix, and are never drawn.
        ranks: share the writing; every one gets all answers.
    """

    def __init__(
        self,
        options: OnPolicy,
        questions: Sequence[Sequence[int]],
        *,
        steps: int,
        batch_tokens: int,
        seed: int,
        ends: Collection[int],
        vocabulary: int,
        ranks: Ranks = ALONE,
    ):
        if not questions:
            raise ValueError("no questions for the student to answer")
        self.options, self.questions = options, questions
        self.steps, self.batch_tokens, self.seed = steps, batch_tokens, seed
        self.ends, self.vocabulary, self.ranks = set(ends), vocabulary, ranks
        self.pad_to = PAD_TO * max(1, round(options.max_tokens / WIDTHS / PAD_TO))
        self._by_width: dict[int, list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            width = self.pad_to * -(-(len(question) + options.max_tokens) // self.pad_to)
            self._by_width[width].append(i)
        self.share = options.share if options.schedule == "constant" else 0.0
        self.loss: float | None = None  # of validation, when the share last rose; at first before training
        self.buffer: deque[Encoded] = deque(maxlen=options.buffer)
        self.alarm = LengthAlarm(options.max_tokens)

    def micro_batch(self, index: int, step: int, student: nn.Module) -> OwnBatch | None:
        """Micro-batch `index`; None where it holds rows of the data.

        Args:
            step: from 1. With a buffer, fresh rows become rarer towards the last one.
        """
        draw = generator(self.seed, "on-policy", index).random()
        if draw >= self.share:
            return None
        fresh = self.share * (1 - (step - 1) / self.steps) if self.options.buffer else self.share
        size = self._size(max(self._by_width))
        if draw >= fresh and len(self.buffer) >= size:
            chosen = generator(self.seed, "replay", index).choice(len(self.buffer), size, replace=False)
            rows = [self.buffer[i] for i in chosen.tolist()]
            return OwnBatch(make_batch(rows, self.pad_to), [])
        rows, answers = self._write(index, student)
        self.buffer.extend(rows)
        self.alarm.add(answers)
        return OwnBatch(make_batch(rows, self.pad_to), answers)

    def _write(self, index: int, student: nn.Module) -> tuple[list[Encoded], list[Answer]]:
        """As many questions of like length as make a batch, answered; unfinished answers as they are."""
        random = generator(self.seed, "questions", index)
        widths = sorted(self._by_width)
        counts = [len(self._by_width[width]) for width in widths]
        width = widths[int(random.choice(len(widths), p=[count / sum(counts) for count in counts]))]
        pool, size = self._by_width[width], self._size(width)
        asked = [self.questions[pool[i]] for i in random.choice(len(pool), size, len(pool) < size).tolist()]

        def write(places: list[int]) -> list[Answer]:
            return generate(
                student,
                [asked[place] for place in places],
                self.ends,
                max_tokens=self.options.max_tokens,
                batch_size=size,
                sampling=self.options,
                keys=[f"on-policy {index} {place}" for place in places],
                seed=self.seed,
                vocabulary=self.vocabulary,
            )

        answers = [Answer(*one) for one in self.ranks.every_part(range(size), write)]
        student.train()
        ended = [[] if answer.end is None else [answer.end] for answer in answers]
        rows = [
            Encoded([*question, *answer.tokens, *end], len(question))
            for question, answer, end in zip(asked, answers, ended, strict=True)
        ]
        return rows, answers

    def largest(self) -> tuple[int, Encoded]:
        """The width of the widest batch, and a row of it with an answer as long as one may be."""
        width = max(self._by_width)
        question = self.questions[self._by_width[width][0]]
        answer = list(islice(cycle(question), self.options.max_tokens))
        return width, Encoded([*question, *answer], len(question))

    def _size(self, width: int) -> int:
        return max(1, self.batch_tokens // width)

    def validated(self, loss: float) -> bool:
        """Note a validation loss, and say whether the share rose; of `adaptive` alone.

        It rises by 0.1 where the loss is 0.1 nats or more above that of its last rise, or at first above that
        of the student before training (DistiLLM, Ko et al. 2024, arXiv 2402.03898, and its released code).
        """
        if self.options.schedule == "constant":
            return False
        known = loss if math.isfinite(loss) else self.loss  # JSON, so a checkpoint, has no others
        if self.loss is None or loss < self.loss + RISE:
            self.loss = known if self.loss is None else self.loss
            return False
        before, self.loss = self.share, known
        self.share = min(self.options.share, self.share + RISE)
        return self.share > before

    @property
    def needs_loss(self) -> bool:
        """Whether the validation loss before training is still to be noted."""
        return self.options.schedule == "adaptive" and self.loss is None

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore` goes on."""
        return {
            "share": self.share,
            "loss": self.loss,
            "buffer": [[row.tokens, row.start] for row in self.buffer],
            "alarm": self.alarm.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.share, self.loss = state["share"], state["loss"]
        self.buffer.clear()
        self.buffer.extend(Encoded(tokens, start) for tokens, start in state["buffer"])
        self.alarm.restore(state["alarm"])
