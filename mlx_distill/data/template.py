"""From a row to token ids: the chat template, the boundary of the prompt, the end of the turn.

The prompt and what follows it are encoded apart and joined, so a model trains on the very ids that it is
given when it generates; encoded as one string, a tokenizer may merge across the boundary. Of a chat,
only the last assistant message is counted, as in mlx-lm; earlier ones are part of the prompt.
"""

from typing import Any

from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError, DistillError, ModelError
from mlx_distill.time_limit import time_limit

LONGEST = 5.0  # seconds for a chat template to write a chat; most take a thousandth of one


def encode(row: Row, tokenizer: Any, *, count: str = "completion") -> Encoded:
    """The ids of a row with an answer, its end-of-turn token last, and where counting starts.

    Args:
        tokenizer: of transformers, or mlx-lm's wrapper of one. With a chat template, prompt and completion
            become a user's and an assistant's message; without, they are joined as they stand.
        count: "completion" counts the answer and its end-of-turn token; "all" counts everything but the
            first token. Rows in form `text` are counted whole either way.

    Raises:
        DataError: no answer in the row, or a chat that the template cannot write.
    """
    if row.text is not None:
        tokens = _end_turn(opening(row.text, tokenizer), tokenizer, row)
        if len(tokens) < 2:
            raise DataError(f"{row.origin}: the tokenizer makes nothing of `text`")
        return Encoded(tokens, 1)
    prompt = encode_prompt(row, tokenizer)
    if has_chat_template(tokenizer):
        messages = _chat(row)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{row.origin}: no answer: the last message must be the assistant's")
        before = _render(messages[:-1], row, tokenizer, add_generation_prompt=True)
        whole = _render(messages, row, tokenizer, add_generation_prompt=False)
        if not whole.startswith(before):
            raise DataError(
                f"{row.origin}: the chat template does not extend its own prompt: "
                f"it asks with {before[-40:]!r}, but an answered chat is written otherwise there"
            )
        answer = whole[len(before) :]
    elif row.completion is None:
        raise DataError(f"{row.origin}: no answer: a row to learn from needs a `completion`")
    else:
        answer = row.completion
    tokens = prompt + _end_turn(_continuation(answer, tokenizer), tokenizer, row)
    return Encoded(tokens, 1 if count == "all" else max(1, len(prompt)))


def encode_test(row: Row, tokenizer: Any, *, count: str) -> Encoded:
    """As `encode`; of a row without an answer, as one with tests may be, the prompt: nothing counts."""
    if row.text is not None or row.answer() is not None:
        return encode(row, tokenizer, count=count)
    tokens = encode_prompt(row, tokenizer)
    return Encoded(tokens, len(tokens))


def encode_prompt(row: Row, tokenizer: Any, *, thinking: bool | None = None) -> list[int]:
    """What a model is given in order to answer: all of the row before its last assistant message.

    Args:
        thinking: `enable_thinking` of the chat template; None: as the template has it.

    Raises:
        DataError: plain text, which has no prompt, or a chat that the template cannot write.
    """
    if row.text is not None:
        raise DataError(f"{row.origin}: plain `text` has no prompt that could be answered")
    if has_chat_template(tokenizer):
        messages = _chat(row)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise DataError(f"{row.origin}: the chat opens with an answer; put the question before it")
        text = _render(messages, row, tokenizer, add_generation_prompt=True, thinking=thinking)
        tokens = tokenizer.encode(text, add_special_tokens=False)  # the template wrote them
        if not tokens:
            raise DataError(f"{row.origin}: the chat template writes nothing for the messages")
        return tokens
    if row.prompt is None:
        raise DataError(f"{row.origin}: `messages` need a chat template, and the tokenizer has none")
    if row.tools is not None:
        raise DataError(f"{row.origin}: `tools` need a chat template, and the tokenizer has none")
    tokens = opening(row.prompt, tokenizer)
    if not tokens:
        raise DataError(f"{row.origin}: the tokenizer makes nothing of `prompt`")
    return tokens


def decode_answer(tokens: list[int], tokenizer: Any) -> str:
    """The text of generated ids, up to the first end-of-turn token: spaces at its start included.

    A sentencepiece tokenizer takes the first space of whatever it decodes for its own.
    """
    ends = end_of_turn_ids(tokenizer)
    length = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    anchor = _anchor(tokenizer)
    text = tokenizer.decode([*anchor, *tokens[:length]], clean_up_tokenization_spaces=False)
    return text.removeprefix("\n") if anchor else text


def has_chat_template(tokenizer: Any) -> bool:
    """Whether chats can be written. mlx-lm's wrapper also has templates that are Python functions."""
    wrapped = getattr(tokenizer, "has_chat_template", None)
    return tokenizer.chat_template is not None if wrapped is None else wrapped


def end_of_turn_ids(tokenizer: Any) -> set[int]:
    """The ids at which a model stops."""
    more = getattr(tokenizer, "eos_token_ids", None)  # a set in mlx-lm's wrapper, one id in transformers
    ids = {tokenizer.eos_token_id, *([more] if isinstance(more, int) else more or ())}
    return ids - {None}


def _chat(row: Row) -> list[dict[str, Any]]:
    if row.messages is not None:
        return list(row.messages)
    messages = [{"role": "user", "content": row.prompt}]
    if row.completion is not None:
        messages.append({"role": "assistant", "content": row.completion})
    return messages


def render(messages: list[dict[str, Any]], tokenizer: Any, **how: Any) -> str:
    """A chat as the tokenizer's template writes it. The template is another's program, in jinja2's sandbox.

    Raises:
        DataError: it refuses the messages, or writes what is no text.
        ModelError: it does not come to an end.
    """
    try:
        with time_limit(LONGEST):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
        text.encode("utf-8")  # half a surrogate pair is no text for the tokenizer
        return text
    except DistillError:  # Ctrl-C
        raise
    except TimeoutError:
        raise ModelError(f"the chat template takes longer than {LONGEST:g} s to write a chat") from None
    except Exception as error:  # whatever Python can raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"the chat template refuses the messages ({reason})") from None


def _render(
    messages: list[dict[str, Any]],
    row: Row,
    tokenizer: Any,
    *,
    add_generation_prompt: bool,
    thinking: bool | None = None,
) -> str:
    tools = None if row.tools is None else list(row.tools)
    more: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        return render(messages, tokenizer, tools=tools, add_generation_prompt=add_generation_prompt, **more)
    except (DataError, ModelError) as error:
        raise type(error)(f"{row.origin}: {error}") from None


def opening(text: str, tokenizer: Any) -> list[int]:
    """Text at the start of a sequence, behind a BOS token where the tokenizer adds one."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if bos is None or tokens[:1] == [bos] or tokenizer.encode("")[:1] != [bos]:
        return tokens
    return [bos, *tokens]


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Text in the middle of a sequence, without the space that some tokenizers open every string with."""
    anchor = _anchor(tokenizer)
    if anchor:
        both = tokenizer.encode("\n" + text, add_special_tokens=False)
        if both[: len(anchor)] == anchor:
            return both[len(anchor) :]
    return tokenizer.encode(text, add_special_tokens=False)


def _anchor(tokenizer: Any) -> list[int]:
    """The ids of a newline, for tokenizers that open every string with a space; none for others.

    Sentencepiece of the Llama 2 kind does. Behind the newline, whose ids are then dropped, it is not the
    answer that gets the space.
    """
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[:1])
    opens_with_space = bool(first) and first[0].startswith(("▁", "Ġ"))
    return tokenizer.encode("\n", add_special_tokens=False) if opens_with_space else []


def _end_turn(tokens: list[int], tokenizer: Any, row: Row) -> list[int]:
    """Cut what a template writes after the end-of-turn token (Qwen's newline), or add a missing one.

    The model stops at that token, so nothing behind it is ever generated.
    """
    ends = end_of_turn_ids(tokenizer)
    if not ends:
        raise DataError(f"{row.origin}: the tokenizer names no end-of-turn token; set its `eos_token`")
    last = max((index for index, token in enumerate(tokens) if token in ends), default=None)
    if last is not None and not tokenizer.decode(tokens[last + 1 :]).strip():
        return tokens[: last + 1]
    eos = tokenizer.eos_token_id
    return [*tokens, min(ends) if eos is None else eos]
