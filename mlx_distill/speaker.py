"""A model that answers one prompt after the other, token by token, through mlx-lm."""

import gc
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill import models
from mlx_distill.asked import as_chat
from mlx_distill.data.rows import Row
from mlx_distill.data.template import (
    decode_answer,
    encode_prompt,
    end_of_turn_ids,
    has_chat_template,
    opening,
)
from mlx_distill.errors import DataError, NotFound, RecipeError
from mlx_distill.generate import keys_of
from mlx_distill.keys import key_word
from mlx_distill.model_names import find_model, near
from mlx_distill.sampling import Draws, cut, gumbel_noise
from mlx_distill.speech import Speech
from mlx_distill.spelling import Speller

_CONTEXT = "max_position_embeddings"  # where a config says how much a model reads

End = Literal["turn", "length", "context", "stopped"]
_ENDS = {"length": "cut off by --max-tokens", "context": "the model's context is full", "stopped": "stopped"}


class Said(NamedTuple):
    """One answer, and what it took."""

    text: str
    tokens: list[int]  # without the end-of-turn token
    end: End  # why: its own end, a limit, or the user
    prompt_tokens: int
    read: int  # of the prompt's tokens; the others were read in an earlier turn
    first_seconds: float  # to the first token
    tokens_per_second: float | None  # after the first; None: there was no second

    def told(self) -> str:
        """Numbers of an answer, in one line."""
        parts = [f"{len(self.tokens)} tokens", f"the first after {self.first_seconds:.2f} s"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self.end in _ENDS:
            parts.append(_ENDS[self.end])
        return ", ".join(parts)


class Speaker:
    """A model by its name, its tokenizer ready, its weights read by `wake` or with the first answer.

    Raises:
        NotFound, ModelError: no such model, or its files are damaged.
        RecipeError: a switch of the chat template that this model does not have.
    """

    def __init__(self, name: str, options: Speech):
        self.name, self.options = name, options
        found = find_model(name)
        try:
            self.loaded = models.load(found, "MODEL", lazy=True, trust=options.trust_remote_code)
        except NotFound as error:
            raise NotFound(f"{error}{near(name)}") from None
        tokenizer, config = self.loaded.tokenizer, self.loaded.config
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1  # rows of the head behind it are padding
        self.context = config.get(_CONTEXT, config.get("text_config", {}).get(_CONTEXT))
        self.chats = has_chat_template(tokenizer) and not options.raw
        self._kept: tuple[list[Any], list[int]] = ([], [])  # the cache, and the tokens that it has read
        self._check_switches()

    def encode(self, row: Row, system: str | None = None) -> list[int]:
        """The tokens that a question is asked with.

        Args:
            system: message that opens the chat, before the row's own.

        Raises:
            DataError: too long for the model, no question, or a chat that the template cannot write.
        """
        tokenizer = self.loaded.tokenizer
        if self.options.raw:
            tokens = opening(row.question(), tokenizer)
        else:
            tokens = encode_prompt(as_chat(row, system, ()), tokenizer, thinking=self.options.thinking)
        if not tokens:
            raise DataError(f"{row.origin}: {self.name} reads no token in it")
        if self.context is not None and len(tokens) >= self.context:
            raise DataError(
                f"{row.origin}: {len(tokens)} tokens, and {self.name} reads fewer than {self.context}; "
                "shorten it"
            )
        return tokens

    def wake(self) -> None:
        """Read the weights."""
        mx.eval(self.loaded.model.parameters())

    def forget_weights(self) -> None:
        """Give back the memory of the model, which answers no more; its tokenizer stays."""
        self.loaded = self.loaded._replace(model=nn.Module())
        self._kept = ([], [])
        gc.collect()
        mx.clear_cache()

    def answer(
        self,
        prompt: list[int],
        show: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Said:
        """Answer, as `generate.generate` would with the same options and seed.

        Tokens that the prompt shares with what was read before, and the model's own answers among them, are
        not read again.

        Args:
            prompt: from `encode`.
            show: is given each piece of text as it comes.
            stopped: asked after each token, and while a long prompt is read; True ends the answer.
        """
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        cache, reused = self._take(prompt)
        room = self.options.max_tokens
        why: End = "length"
        if self.context is not None and self.context - len(prompt) < room:
            room, why = self.context - len(prompt), "context"
        tokenizer = self.loaded.tokenizer
        ends, speller = end_of_turn_ids(tokenizer), Speller(tokenizer)
        written, times = list[int](), list[float]()
        started = time.perf_counter()

        def check(*_: int) -> None:
            if stopped():
                raise _Stopped

        with ExitStack() as stack:
            with redirect_stdout(sys.stderr):  # where mlx-lm warns of a model that barely fits
                streams: Any = [generation_stream]  # a kind of its own since 0.32, which works alike
                stack.enter_context(wired_limit(self.loaded.model, streams))
            steps: Any = generate_step(
                mx.array(prompt[reused:]),
                self.loaded.model,
                max_tokens=room,
                sampler=self._sampler(prompt),
                prompt_cache=cache,
                prompt_progress_callback=check,
            )
            stack.callback(steps.close)
            try:
                for token, _ in steps:
                    times.append(time.perf_counter())
                    written.append(token)
                    if token in ends:
                        why = "turn"
                        break
                    show(speller.add(token))
                    if stopped():
                        why = "stopped"
                        break
                self._kept = cache, prompt + written  # mlx-lm reads a token before it gives it away
            except _Stopped:  # somewhere in the prompt
                why = "stopped"
        show(speller.rest())
        tokens = written[:-1] if why == "turn" else written
        pace = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
        return Said(
            decode_answer(tokens, tokenizer),
            tokens,
            why,
            len(prompt),
            len(prompt) - reused,
            times[0] - started if times else time.perf_counter() - started,
            pace,
        )

    def _take(self, prompt: list[int]) -> tuple[list[Any], int]:
        """A cache that has read the beginning of a prompt, and how much of it, less than all."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        (cache, read), self._kept = self._kept, ([], [])
        same = common(read, prompt[:-1])  # the last one is read to draw what follows it
        back = len(read) - same
        if same and (not back or (can_trim_prompt_cache(cache) and trim_prompt_cache(cache, back) == back)):
            return cache, same
        return make_prompt_cache(self.loaded.model), 0

    def _sampler(self, prompt: list[int]) -> Callable[[mx.array], mx.array]:
        """Draws from (1, V) log-probabilities: tempered, cut by top-k, top-p and min-p, real tokens alone.

        The random numbers are those of `generate.generate` for this prompt.
        """
        options, size = self.options, self.vocabulary
        word = key_word(options.seed, f"answer {keys_of([prompt])[0]}")
        draws = Draws(np.array([word], dtype=np.uint64))

        def draw(logprobs: mx.array) -> mx.array:
            logits = logprobs[..., :size]
            if options.temperature == 0:
                return mx.argmax(logits, axis=-1)
            kept = at_least(cut(logits, options), options.min_p)
            return mx.argmax(kept + gumbel_noise(draws.advance(1), size), axis=-1)

        return draw

    def _check_switches(self) -> None:
        """Refuse what only a chat template can do where there is none, or where it cannot."""
        asked = Row(prompt="?", origin="MODEL")
        for key in ("system", "thinking"):
            if getattr(self.options, key) is not None and not self.chats:
                raise RecipeError(f"--{key}: {self.name} has no chat template; leave it out")
        if self.options.system is not None:
            self.encode(asked, self.options.system)
        if self.options.thinking is not None:
            shown = [encode_prompt(asked, self.loaded.tokenizer, thinking=on) for on in (True, False)]
            if shown[0] == shown[1]:
                raise RecipeError(
                    f"--thinking: the chat template of {self.name} has no `enable_thinking`; leave it out"
                )


def at_least(logits: mx.array, share: float) -> mx.array:
    """Logits (..., V), -inf for tokens less likely than `share` times the likeliest (0: none).

    Nguyen et al. 2024, arXiv 2407.01082, section 3; here the logits are tempered already.
    """
    if share == 0:
        return logits
    least = mx.max(logits, axis=-1, keepdims=True) + math.log(share)
    return mx.where(logits < least, -mx.inf, logits)


def common(one: Any, other: Any) -> int:
    """How many letters, or tokens, two texts or lists begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


class _Stopped(Exception):
    """Out of the reading of a prompt."""
