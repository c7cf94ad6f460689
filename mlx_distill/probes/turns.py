"""Whether teacher and student end a turn alike, and write chats alike.

A student that ends its answers with a token that its teacher never writes there is pushed away from it, and
may not stop at all before it has learned the other one (ms-swift#9526). The student learns the template and
the end of the turn of its teacher where that has them; these checks say what that changes.
"""

from collections.abc import Mapping
from typing import Any

from mlx_distill.data.template import end_of_turn_ids, has_chat_template, render
from mlx_distill.errors import DataError, ModelError
from mlx_distill.speaker import common

MARK = "ANSWERED"
CHAT = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": MARK},
    {"role": "user", "content": "And 3 + 3?"},
)
AROUND = 24  # characters of a rendered chat that are shown from where it parts from another


def other_turns(
    student: tuple[str, Any] | None,
    teachers: Mapping[str, Any],
    used: Any,
    *,
    chats: bool,
    on_policy: bool,
    all_own: bool,
) -> list[str]:
    """Lines on ends of turns and chat templates that differ between models of one vocabulary.

    Args:
        student: the key of the recipe that a loaded student comes from, and its own tokenizer.
        teachers: tokenizers by their keys, the one that answers prompts first; of those with the student's
            vocabulary.
        used: the tokenizer that the student trains with: its own, or the first teacher's.
        chats: rows are written with the chat template, if there is one.
        on_policy: the student answers questions itself. all_own: and learns from nothing else.

    Raises:
        ModelError: an `all_own` student that ends turns otherwise than its teacher: no row shows it the end.
    """
    own = [student] if student is not None and student[1] is used else []
    lines = [line for key, one in [*own, *teachers.items()] if chats and (line := _endless(key, one))]
    if not teachers:
        return lines
    first, writer = next(iter(teachers.items()))
    if student is not None:
        lines += _ends(*student, first, writer, chats, on_policy=on_policy, all_own=all_own)
    if chats:
        lines += _templates(student, teachers, used)
    return lines


def turn_end(tokenizer: Any, *, chats: bool = True) -> int | None:
    """The id that closes an assistant's turn: what the chat template writes behind it, or else the eos."""
    if chats and has_chat_template(tokenizer):
        ids = _behind_answer(tokenizer)
        ends = [token for token in ids if token in end_of_turn_ids(tokenizer)]
        special = [token for token in ids if token in _specials(tokenizer)]
        if found := ends[:1] or special[:1]:
            return found[0]
    return tokenizer.eos_token_id


def _endless(key: str, tokenizer: Any) -> str | None:
    """A model whose template closes a turn with a token at which it does not stop."""
    end, ends = turn_end(tokenizer), end_of_turn_ids(tokenizer)
    if end is None or end in ends:
        return None
    return (
        f"`{key}` closes a turn with {_token(tokenizer, end)} in its chat template, but stops only at "
        f"{_tokens(tokenizer, ends)}: its answers run on; add {end} to `eos_token_id` in its "
        "generation_config.json, or choose a model that was trained to chat"
    )


def _ends(
    key: str, own: Any, first: str, writer: Any, chats: bool, *, on_policy: bool, all_own: bool
) -> list[str]:
    """A student that knows another end of the turn than the one that it is to learn."""
    wanted, known = turn_end(writer, chats=chats), end_of_turn_ids(own)
    if wanted is None or wanted in known:
        return []
    told = (
        f"`{key}` ends a turn with {_tokens(own, known)}, `{first}` with {_token(writer, wanted)}: the "
        "student has to learn to stop"
    )
    if all_own:
        raise ModelError(
            f"{told}, and no row shows it where, because it learns from its own answers alone, which would "
            "become ever longer; choose a student that ends as the teacher does, or a "
            "`generate.on_policy.share` below 1 beside rows with answers"
        )
    if on_policy:
        return [f"{told}; until it has, its own answers may run to `generate.on_policy.max_tokens`"]
    return [f"{told}; before training its answers run to their longest"]


def _templates(student: tuple[str, Any] | None, teachers: Mapping[str, Any], used: Any) -> list[str]:
    """Who reads or writes chats in another template than its own."""
    lines, rendered = [], {key: _rendered(one) for key, one in teachers.items()}
    first = next(iter(rendered))
    if student is not None:
        key, own = student[0], _rendered(student[1])
        if rendered[first] is None and own is not None:
            lines.append(
                f"`{first}` has no chat template, and reads the one of `{key}`, which it was not trained on"
            )
        elif own is None and rendered[first] is not None:
            lines.append(f"`{key}` has no chat template; the student learns the one of `{first}`")
        elif own is not None and own != rendered[first]:
            lines.append(
                f"`{key}` has another chat template than `{first}`, {_parting(own, rendered[first])}; the "
                f"student learns the one of `{first}` and is saved with it"
            )
    chosen = _rendered(used)
    for key, text in rendered.items():
        if key != first and text is not None and chosen is not None and text != chosen:
            lines.append(
                f"`{key}` has another chat template than the one that rows are written in, "
                f"{_parting(text, chosen)}; it judges chats that it was not trained on"
            )
    return lines


def _rendered(tokenizer: Any) -> str | None:
    """The probe chat as the template writes it; None without one, or where it refuses."""
    if not has_chat_template(tokenizer):
        return None
    try:
        return render(list(CHAT), tokenizer, add_generation_prompt=True)
    except DataError:  # rows that it refuses are told of with their place
        return None


def _behind_answer(tokenizer: Any) -> list[int]:
    try:
        text = render(list(CHAT[:2]), tokenizer, add_generation_prompt=False)
    except DataError:  # as above
        return []
    return tokenizer.encode(text.partition(MARK)[2], add_special_tokens=False)


def _specials(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _parting(one: str, other: str | None) -> str:
    """Where two texts part, from a few characters before it on."""
    other = other or ""
    at = max(0, common(one, other) - 8)
    return f"{one[at : at + AROUND]!r} in place of {other[at : at + AROUND]!r}"


def _token(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens([token])[0])


def _tokens(tokenizer: Any, tokens: set[int]) -> str:
    return " or ".join(_token(tokenizer, token) for token in sorted(tokens)) or "nothing"
