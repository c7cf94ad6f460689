"""What is sent for a row, and what is read from the answer: OpenAI's chat and text completions.

`top_k` and `chat_template_kwargs` are no fields of OpenAI's own; vLLM, mlx-lm, LM Studio and llama.cpp take
them. They are sent only where the recipe sets them.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlx_distill import keys
from mlx_distill.asked import as_chat, turns
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.options import Endpoint, Generate, Reasoning

# Why an answer ended, where the model ended it itself; `eos_token` and `eos` are some servers' own words.
_ENDED = {"stop", "tool_calls", "function_call", "eos_token", "eos", "end_turn"}

_MOST_TOKENS = 10**9  # that a server may say an answer has; more is no count


class Said(NamedTuple):
    """An answer as a server gave it."""

    text: str
    finished: bool
    mean_nll: float | None  # nats a token, where it gave log-probabilities
    tokens: int | None  # of the answer, where it counted them


def path_of(endpoint: Endpoint) -> str:
    """Where a request goes, below the url."""
    return "chat/completions" if endpoint.chat else "completions"


def bodies(
    endpoint: Endpoint, options: Generate, row: Row, sample: int, *, seed: int, examples: Sequence[Row] = ()
) -> list[dict[str, Any]]:
    """The request for an answer, in every form to be tried in turn: servers differ in what they take.

    Later forms leave out log-probabilities, then the seed: the answer is as good without. What shapes the
    answer (temperature, `top_k`, `top_p`, the template's switches) is never left out.

    Args:
        sample: which of the answers to this row; each has a seed of its own.
        examples: rows with answers that stand before the question.

    Raises:
        DataError: a row that cannot be asked in this way.
    """
    asked: dict[str, Any] = {"model": endpoint.model}
    if endpoint.chat:
        asked["messages"] = _messages(options, row, examples)
        if row.tools is not None:
            asked["tools"] = list(row.tools)
    else:
        asked["prompt"] = _prompt(row, examples)
    asked |= {"max_tokens": options.max_tokens, "temperature": options.temperature}
    if options.top_p < 1:
        asked["top_p"] = options.top_p
    if options.top_k is not None:
        asked["top_k"] = options.top_k
    if options.thinking is not None and endpoint.chat:
        asked["chat_template_kwargs"] = {"enable_thinking": options.thinking}
    extras: list[dict[str, Any]] = [{"logprobs": True}, {}]
    if not endpoint.chat:
        extras.insert(0, {"logprobs": 1})  # OpenAI's text completions count them; mlx-lm's want true
    if options.temperature == 0:  # nothing is drawn
        return [asked | extra for extra in extras]
    # Of the question alone, so that other limits or another order of rows leave the seed as it is.
    question = json.dumps([asked.get(key) for key in ("messages", "tools", "prompt")], sort_keys=True)
    purpose = f"endpoint/{hashlib.sha256(question.encode()).hexdigest()}/{sample}"
    drawn = {"seed": keys.key_word(seed, purpose) >> 33}  # servers take 31 bits at least
    return [asked | drawn | extra for extra in extras] + [asked]


def read(tree: Any, reasoning: Reasoning | None) -> Said:
    """The answer in a decoded response.

    Args:
        reasoning: marks to put around reasoning that came in a field of its own, in front of the answer;
            None leaves it out.

    Raises:
        ValueError: what is missing.
    """
    choices = tree.get("choices") if isinstance(tree, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise ValueError("no `choices` in it")
    message = choice.get("message")
    if isinstance(message, dict):
        text = message.get("content")
        thought = message.get("reasoning_content") or message.get("reasoning")
    elif "text" in choice:
        text, thought = choice["text"], None
    else:
        raise ValueError("neither `message` nor `text` in it")
    if text is not None and not isinstance(text, str):
        raise ValueError("the answer in it is no text")
    reason = choice.get("finish_reason")
    if not isinstance(reason, str):
        raise ValueError("no `finish_reason` in it")
    text = text or ""  # null beside a tool call, or where reasoning took all tokens
    if reasoning is not None and isinstance(thought, str) and thought:
        text = f"{reasoning.open}{thought}{reasoning.close}{text}"
    usage = tree.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Said(
        text.encode("utf-8", "replace").decode(),  # half a surrogate pair could not be written to a file
        reason in _ENDED,
        _mean_nll(choice.get("logprobs")),
        tokens if type(tokens) is int and 0 <= tokens <= _MOST_TOKENS else None,
    )


def _messages(options: Generate, row: Row, examples: Sequence[Row]) -> list[dict[str, Any]]:
    if row.text is not None:
        raise DataError(f"{row.origin}: plain `text` has no prompt that could be answered")
    if not turns(row):
        raise DataError(f"{row.origin}: the chat opens with an answer; put the question before it")
    return turns(as_chat(row, options.system, examples))


def _prompt(row: Row, examples: Sequence[Row]) -> str:
    for one in (row, *examples):
        if one.prompt is None or one.tools is not None:
            what = "`tools`" if one.prompt is not None else "a chat" if one.messages else "plain `text`"
            raise DataError(
                f"{one.origin}: `generate.endpoint.chat` false sends a `prompt` as it stands; "
                f"this row has {what}"
            )
    shown = [f"{example.prompt}{example.completion}\n\n" for example in examples]
    return "".join([*shown, row.prompt or ""])


def _mean_nll(logprobs: Any) -> float | None:
    """Nats a token, from the chat's form or the text's; None where any of it is missing or no number."""
    if not isinstance(logprobs, dict):
        return None
    content, plain = logprobs.get("content"), logprobs.get("token_logprobs")
    if isinstance(content, list):
        values = [one.get("logprob") if isinstance(one, dict) else None for one in content]
    else:
        values = plain if isinstance(plain, list) else []
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values) or not all(map(math.isfinite, numbers)):
        return None
    return -math.fsum(numbers) / len(numbers)
