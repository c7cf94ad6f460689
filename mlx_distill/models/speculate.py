"""Self-speculative decoding: the first layers of a model draft, and all of them check the draft."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import mlx.core as mx

from mlx_distill.models.early_exit import Passage, Stack, most_likely


class SpeculatedAnswer(NamedTuple):
    """What a model wrote, and what that took. `tokens / calls` is what drafting is worth."""

    tokens: list[int]  # without the end-of-turn token
    finished: bool  # ended its turn itself, before `max_tokens`
    calls: int  # of the layers above the exit; plain decoding calls them once a token
    drafted: int  # tokens that the layers up to the exit proposed
    accepted: int  # of them, those that the answer contains, its end-of-turn token included


def speculate(
    stack: Stack,
    prompt: Sequence[int],
    *,
    exit: int,
    draft: int,
    stop: set[int],
    max_tokens: int,
) -> SpeculatedAnswer:
    """The whole model's greedy answer, in fewer calls of its upper layers.

    Layers up to `exit` write `draft` tokens one by one; the layers above read all of them at once, from
    the hidden states that drafting left at the exit. The longest beginning of the draft that the whole
    model agrees with stays, and the model's own next token follows it; the caches take back the rest
    (LayerSkip, section 4.3; Leviathan et al. 2023, arXiv 2211.17192, for the rule, greedy).

    Each token is `most_likely` by the whole model's logits after the tokens before it. Those logits are
    computed for several positions at once, and so may differ in their last bits from logits of one
    position: where the best two lie closer together than that, plain decoding may take the other one.

    Args:
        prompt: token ids, at least one.
        exit: layer that drafts, 1 to L - 1.
        draft: tokens a round; fewer where `max_tokens` leaves no room for them.
        stop: ids that end a turn.
    """
    if not prompt:
        raise ValueError("prompt: empty; a model needs one token to follow")
    if draft < 1:
        raise ValueError(f"draft: {draft} tokens a round; give one or more")
    passage = Passage(stack, [exit])
    passage.read(prompt[:-1])
    tokens = list[int]()
    newest, calls, drafted, accepted = prompt[-1], 0, 0, 0
    while len(tokens) < max_tokens:
        count = min(draft, max_tokens - len(tokens) - 1)
        proposed, answers = _round(passage, newest, count)
        agreed = next((n for n in range(count) if proposed[n] != answers[n]), count)
        passage.take_back(count - agreed)
        new = answers[: agreed + 1]
        end = next((n for n, token in enumerate(new) if token in stop), None)
        calls, drafted = calls + 1, drafted + count
        accepted += agreed if end is None else min(agreed, end + 1)
        tokens += new[:end]
        if end is not None:
            return SpeculatedAnswer(tokens, True, calls, drafted, accepted)
        newest = new[-1]
    return SpeculatedAnswer(tokens, False, calls, drafted, accepted)


def _round(passage: Passage, newest: int, count: int) -> tuple[list[int], list[int]]:
    """Draft `count` tokens behind `newest`, and what the whole model says after it and after each."""
    stack, token = passage.stack, mx.array([[newest]])
    proposed = []
    hidden = passage.enter(token)
    for _ in range(count):
        token = most_likely(stack.logits(hidden))
        proposed.append(token)
        hidden = passage.enter(token)
    answers = most_likely(stack.logits(passage.climb(1)))
    # One evaluation a round: no token of the draft is looked at before the check is done.
    both = cast(list[int], mx.concatenate([*proposed, answers], axis=1)[0].tolist())
    return both[:count], both[count:]
