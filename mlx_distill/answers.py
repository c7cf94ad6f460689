"""The teacher's answers: written once, kept with their reasons, and turned into rows to learn from."""

import dataclasses
from typing import Any

from mlx_distill.data.batch import Encoded
from mlx_distill.data.rows import Row
from mlx_distill.data.template import decode_answer, encode, end_of_turn_ids
from mlx_distill.errors import DataError
from mlx_distill.generate import generate
from mlx_distill.work import Work


def generate_answers(work: Work) -> dict[str, Any]:
    """The teacher answers `data.prompts`; answers it does not finish, or leaves empty, are dropped."""
    asked = work.prepared.prompts
    if not asked:
        return {}
    options, teacher = work.recipe.generate, work.teacher()
    ends = end_of_turn_ids(teacher.tokenizer)
    answers = generate(
        teacher.model,
        [tokens for _, tokens in asked],
        ends,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        title="teacher answers",
        progress=work.run.progress,
    )
    rows, reasons = [], {}
    for (row, tokens), answer in zip(asked, answers, strict=True):
        text = decode_answer(answer.tokens, teacher.tokenizer)
        reason = None
        if not answer.finished:
            reason = f"unfinished within {options.max_tokens} tokens"
        elif not text.strip():
            reason = "empty"
        elif len(tokens) + len(answer.tokens) >= work.recipe.data.max_tokens:
            reason = f"longer than data.max_tokens {work.recipe.data.max_tokens}"
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
        rows.append(
            {
                "prompt": row.question(),
                "answer": text,
                "tokens": answer.tokens,
                "kept": not reason,
                "reason": reason,
            }
        )
    kept = sum(row["kept"] for row in rows)
    work.run.write_rows("generated", rows)
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    work.run.console.say(f"teacher answers: {kept} of {len(rows)} kept (dropped: {dropped})")
    if not kept:
        raise DataError(
            f"`generate`: no answer of the teacher was kept ({dropped}); raise `generate.max_tokens`?"
        )
    return {"written": len(rows), "kept": kept, "dropped": reasons}


def training_rows(work: Work) -> tuple[list[Row], list[Encoded]]:
    """What the student learns from: the user's labels, then the teacher's kept answers, as text and tokens.

    An answer in the student's own vocabulary is learned as the very tokens that the teacher wrote;
    another is encoded anew, and left out if it is longer than `data.max_tokens` then.
    """
    prepared = work.prepared
    rows, encoded = list(prepared.train_rows), list(prepared.train)
    if not prepared.prompts:
        return rows, encoded
    foreign, data = prepared.teachers["teacher"].foreign, work.recipe.data
    end = prepared.tokenizer.eos_token_id
    for (row, tokens), written in zip(prepared.prompts, work.run.read_rows("generated"), strict=True):
        if not written["kept"]:
            continue
        answered = _answered(row, written["answer"])
        if foreign:
            new = encode(answered, prepared.tokenizer, count=data.count)
            if len(new.tokens) > data.max_tokens:
                continue
        else:
            new = Encoded(
                [*tokens, *written["tokens"], end], 1 if data.count == "all" else max(1, len(tokens))
            )
        rows.append(answered)
        encoded.append(new)
    return rows, encoded


def _answered(row: Row, answer: str) -> Row:
    """The row with this answer in place of its own."""
    if row.messages is None:
        return dataclasses.replace(row, completion=answer)
    asked = [*row.messages]
    if asked[-1]["role"] == "assistant":
        asked.pop()
    return dataclasses.replace(row, messages=(*asked, {"role": "assistant", "content": answer}))
