"""What the writer of an answer is shown, and what the student learns that answer behind.

The writer may see more: a system message, worked examples, a template that lets it think. The student sees
the question alone, and so learns to do without them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode, encode_prompt, has_chat_template
from mlx_distill.errors import RecipeError
from mlx_distill.options import Generate


class Asked(NamedTuple):
    """A question of `data.prompts`."""

    row: Row
    tokens: list[int]  # what the student learns the answer behind
    shown: list[int]  # what the writer is given, in its own ids; a server is asked in text, without these


def shown_to(writer: Any, row: Row, options: Generate, examples: Sequence[Row] = ()) -> list[int]:
    """The ids that a writer is given for a question.

    With a chat template: the system message (before the row's own, if it has one), the examples as turns,
    then the question. Without: each example with the end of its turn, then the question.

    Args:
        writer: its tokenizer.
        examples: rows with answers.

    Raises:
        DataError: a chat that the template cannot write.
        RecipeError: a system message or `thinking` where there is no template for it.
    """
    if has_chat_template(writer):
        return encode_prompt(as_chat(row, options.system, examples), writer, thinking=options.thinking)
    for key in ("system", "thinking"):
        if getattr(options, key) is not None:
            raise RecipeError(
                f"`generate.{key}` needs a chat template, and the teacher's tokenizer has none; leave it out"
            )
    parts = [*(encode(example, writer).tokens for example in examples), encode_prompt(row, writer)]
    bos = writer.bos_token_id
    opened = bos is not None and parts[0][:1] == [bos]
    return parts[0] + [token for part in parts[1:] for token in (part[1:] if opened else part)]


def check_thinking(writer: Any, row: Row, options: Generate) -> None:
    """Refuse `generate.thinking` where the chat template knows no such switch.

    Raises:
        RecipeError: the question reads the same with it and without.
    """
    if options.thinking is None or not has_chat_template(writer):
        return
    both = [encode_prompt(row, writer, thinking=on) for on in (True, False)]
    if both[0] == both[1]:
        raise RecipeError(
            "`generate.thinking`: the teacher's chat template has no `enable_thinking`; leave it out"
        )


def answered(row: Row, answer: str) -> Row:
    """The row with this answer in place of its own."""
    if row.messages is None:
        return replace(row, completion=answer)
    return replace(row, messages=(*turns(row), {"role": "assistant", "content": answer}))


def as_chat(row: Row, system: str | None, examples: Sequence[Row]) -> Row:
    """The row as a chat that opens with the system message and the examples."""
    if system is None and not examples:
        return row
    asked = turns(row)
    opening = [] if system is None else [system]
    if asked and asked[0]["role"] == "system":
        opening.append(str(asked.pop(0).get("content") or ""))
    messages = [{"role": "system", "content": "\n\n".join(opening)}] if opening else []
    for example in examples:
        answer = {"role": "assistant", "content": example.completion}
        messages += [*turns(example), example.messages[-1] if example.messages else answer]
    return replace(row, prompt=None, completion=None, messages=(*messages, *asked))


def turns(row: Row) -> list[dict[str, Any]]:
    """The turns of a row before its last answer."""
    if row.messages is None:
        return [{"role": "user", "content": row.prompt}]
    asked = [*row.messages]
    if asked[-1]["role"] == "assistant":
        asked.pop()
    return asked
