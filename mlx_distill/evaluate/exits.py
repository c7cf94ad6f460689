"""What a student that can answer early gains by it. As models of their own, exits are measured like all."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode_prompt, end_of_turn_ids
from mlx_distill.losses.menu import MENU
from mlx_distill.models import Loaded
from mlx_distill.models.early_exit import EarlyAnswer, Stack, answer_early
from mlx_distill.models.speculate import speculate
from mlx_distill.progress import Progress, silent
from mlx_distill.recipe import Recipe

PROMPTS, DRAFT, SURE = 32, 4, 0.9  # answers, tokens drafted at a time, confidence at which an exit answers


def exits_of(recipe: Recipe) -> list[int]:
    """Layers after which the student learned to answer."""
    terms = (term for name, term in recipe.objective.items() if MENU[name].family == "exit")
    return sorted({layer for term in terms for layer in term.options["exits"]})


def early_answers(
    loaded: Loaded,
    rows: Sequence[Row],
    exits: Sequence[int],
    *,
    max_tokens: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Answer some prompts with the whole model, drafting at each exit, and leaving at the first sure one.

    Args:
        rows: those without a prompt are passed over; the first 32 others are answered, one by one.

    Returns:
        for each exit n: `exitN_tokens_per_call`, tokens that one call of the layers above it gives when it
        drafts 4 at a time; `exitN_draft_speedup`, the whole model's seconds over the drafted answer's,
        median over prompts; `exitN_same_answers`, the share of prompts with the very same tokens.
        `early_mean_layer`: the layer that answers on average if one with a confidence of 0.9 may;
        `early_same_answers`. Empty without prompts.
    """
    asked = [encode_prompt(row, loaded.tokenizer) for row in rows if row.text is None][:PROMPTS]
    if not asked:
        return {}
    stack, stop = Stack(loaded.model), end_of_turn_ids(loaded.tokenizer)

    def whole(prompt: list[int], exits: Sequence[int] = (), threshold: float = 1.0) -> EarlyAnswer:
        return answer_early(stack, prompt, exits=exits, threshold=threshold, stop=stop, max_tokens=max_tokens)

    whole(asked[0])  # warm
    found: dict[str, Any] = {}
    with progress("early exits", len(asked) * (2 + len(exits)), "answers") as advance:

        def timed(answer: Callable[[list[int]], Any]) -> list[tuple[Any, float]]:
            """What each prompt is answered with, and its seconds."""
            answers = []
            for prompt in asked:
                started = time.perf_counter()
                answers.append((answer(prompt), time.perf_counter() - started))
                advance()
            return answers

        plain = timed(whole)
        for layer in exits:
            draft = partial(speculate, stack, exit=layer, draft=DRAFT, stop=stop, max_tokens=max_tokens)
            drafted = timed(draft)
            calls = sum(answer.calls for answer, _ in drafted)
            # An answer that ended itself wrote its end-of-turn token too.
            tokens = sum(len(answer.tokens) + answer.finished for answer, _ in drafted)
            found[f"exit{layer}_tokens_per_call"] = tokens / calls
            pairs = list(zip(plain, drafted, strict=True))
            found[f"exit{layer}_draft_speedup"] = statistics.median(one[1] / two[1] for one, two in pairs)
            same = [one[0].tokens == two[0].tokens for one, two in pairs]
            found[f"exit{layer}_same_answers"] = statistics.fmean(same)
        early = timed(partial(whole, exits=exits, threshold=SURE))
        layers = [layer for answer, _ in early for layer in answer.exits]
        found["early_mean_layer"] = statistics.fmean(layers) if layers else float(len(stack.layers))
        found["early_same_answers"] = statistics.fmean(
            one.tokens == two.tokens for (one, _), (two, _) in zip(plain, early, strict=True)
        )
    return found
