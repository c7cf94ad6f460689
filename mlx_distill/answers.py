"""Answers to `data.prompts`: written block by block, then kept or dropped, each with the reason."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.asked import answered
from mlx_distill.blocks import Begun, Question, line_of, read_block, split, write_block
from mlx_distill.data.batch import Encoded
from mlx_distill.data.template import decode_answer, encode, end_of_turn_ids
from mlx_distill.distributed.links import Message
from mlx_distill.errors import DataError
from mlx_distill.filters import Material, keep, reasons, remembered, summary
from mlx_distill.generate import Answer, generate, keys_of
from mlx_distill.progress import Progress, silent
from mlx_distill.reasoning import as_learned
from mlx_distill.reasoning import split as split_reasoning
from mlx_distill.runaway import RunawayAlarm
from mlx_distill.score import nll_of_rows
from mlx_distill.work import Work
from mlx_distill.written import Written

BATCHES = 32  # in a block: its last answers are written in an ever emptier batch, which costs a few percent
SERVED = 256  # answers in a block of a server's


def generate_answers(work: Work) -> dict[str, Any]:
    """`data.prompts` are answered by the teacher or a server; bad answers are dropped.

    Nothing is written where the student is the only one who answers.

    Raises:
        DataError: no answer is kept; says which filter took how many.
    """
    recipe = work.recipe
    if not work.prepared.prompts or recipe.all_own:
        return {}
    written = _write(work)
    nll = remembered(_nll(work)) if recipe.teacher is not None else None
    material = Material(
        held_out=[*work.prepared.valid_rows, *work.prepared.test_rows],
        nll=nll,
        reasoning=recipe.data.reasoning,
        seconds=recipe.evaluate.seconds,
        unsafe=work.unsafe,
        progress=work.run.progress,
    )
    unusable = [_unusable(work, one) for one in written]
    found = reasons(written, recipe.generate.filters, material, already=unusable)
    found = keep(written, found, recipe.generate.keep, nll)
    work.run.write_rows(
        "generated",
        [
            {"prompt": one.row.question(), **line_of(one), "kept": reason is None, "reason": reason}
            for one, reason in zip(written, found, strict=True)
        ],
    )
    kept, dropped = found.count(None), summary(found)
    _say_steps(work, [one for one, reason in zip(written, found, strict=True) if reason is None])
    told = ", ".join(f"{count} {kind}" for kind, count in dropped.items()) or "none"
    work.run.console.say(f"{_writer(work)} answers: {kept} of {len(written)} kept (dropped: {told})")
    if not kept:
        raise DataError(
            f"`generate`: none of {len(written)} answers was kept (dropped: {told}); {_advice(dropped)}; "
            f"see {work.run.folder / 'samples' / 'generated.jsonl'}"
        )
    return {"written": len(written), "kept": kept, "dropped": dropped}


def _write(work: Work) -> list[Written]:
    """All answers, those of earlier blocks from their files."""
    asked, options = work.prepared.prompts, work.recipe.generate
    # Of a server's block the size is fixed: `at_once` may be another when a run goes on.
    size = SERVED if options.endpoint is not None else BATCHES * options.batch_size
    blocks = {
        work.run.folder / "samples" / "written" / f"{number:05d}.jsonl": questions
        for number, questions in enumerate(split(len(asked), options.samples, size))
    }
    found = {path: read_block(path, questions, asked) for path, questions in blocks.items()}
    missing = [path for path, written in found.items() if written is None]
    if missing:
        total, left = (sum(len(blocks[path]) for path in paths) for paths in (blocks, missing))
        title = f"{_writer(work)} answers"
        if left < total:
            work.run.console.say(f"{title}: going on, {total - left} of {total} are written")
        alarm = RunawayAlarm(work.run.console, options)
        with ExitStack() as stack:
            write = _by_teacher(work) if options.endpoint is None else _by_server(work, stack)
            advance = stack.enter_context(work.run.progress(title, left, "rows"))
            for path in missing:
                written = found[path] = write(path, blocks[path], alarm.watching(advance))
                write_block(path, written)
                alarm.add(written)
    return [one for written in found.values() if written is not None for one in written]


Write = Callable[[Path, list[Question], Progress], list[Written]]


def _by_teacher(work: Work) -> Write:
    asked, teacher = work.prepared.prompts, work.teacher()
    keys = keys_of([one.shown for one in asked])

    def write(path: Path, questions: list[Question], progress: Progress) -> list[Written]:
        named = [(prompt, f"{keys[prompt]} {sample}") for prompt, sample in questions]
        size = work.ranks.size
        parts = [named[rank::size] or None for rank in range(size)]
        if work.is_divided("teacher"):  # all write each of them together
            size, parts = 1, [named, *[None] * (size - 1)]
        replies = work.ranks.share("answers", parts, lambda part: Message(write_part(work, part, progress)))
        answers: list[Any] = [None] * len(questions)
        for rank, reply in enumerate(replies):
            if reply is not None:
                answers[rank::size] = [Answer(*one) for one in reply.value]
        with progress("answers", len(questions), "rows") as advance:
            advance(len(questions) - len(parts[0] or []))  # those of the other ranks
        return [
            Written(
                prompt,
                sample,
                asked[prompt].row,
                decode_answer(answer.tokens, teacher.tokenizer),
                answer.tokens,
                answer.finished,
                end=answer.end,
            )
            for (prompt, sample), answer in zip(questions, answers, strict=True)
        ]

    return write


def write_part(work: Work, part: Sequence[tuple[int, str]], progress: Progress = silent) -> list[Answer]:
    """The teacher's answers that one rank writes.

    Args:
        part: index into `Prepared.prompts` of each question, and the key of its answer.
    """
    teacher, options = work.teacher(), work.recipe.generate
    return generate(
        teacher.model,
        [work.prepared.prompts[prompt].shown for prompt, _ in part],
        end_of_turn_ids(teacher.tokenizer),
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        sampling=options,
        keys=[key for _, key in part],
        seed=work.recipe.seed,
        vocabulary=work.prepared.teachers["teacher"].vocabulary,
        progress=progress,
    )


def _by_server(work: Work, stack: ExitStack) -> Write:
    from mlx_distill import endpoint

    asked, options = work.prepared.prompts, work.recipe.generate
    assert options.endpoint is not None
    if line := endpoint.leaves_network(options.endpoint):
        work.run.console.say(line)
    server = stack.enter_context(endpoint.Server(options.endpoint))

    def write(path: Path, questions: list[Question], progress: Progress) -> list[Written]:
        with Begun(path, asked) as begun:
            return endpoint.write_block(
                options,
                [(prompt, asked[prompt].row, sample) for prompt, sample in questions],
                seed=work.recipe.seed,
                progress=progress,
                server=server,
                reasoning=work.recipe.data.reasoning,
                examples=work.prepared.examples,
                done=begun.answers,
                on_answer=begun.add,
            )

    return write


def _writer(work: Work) -> str:
    return "teacher" if work.recipe.generate.endpoint is None else "server"


def _unusable(work: Work, one: Written) -> str | None:
    """Why no student can learn from an answer, whatever the filters say."""
    data, prepared = work.recipe.data, work.prepared
    if one.refused is not None:
        return f"refused: {one.refused}"
    if not one.finished:
        return f"unfinished within {work.recipe.generate.max_tokens} tokens"
    if not one.text.strip():
        return "empty"
    if data.reasoning is not None and not split_reasoning(one.text, data.reasoning)[1].strip():
        return "no answer behind the worked steps"
    learned = as_learned(answered(one.row, one.text), data.reasoning)
    if one.tokens and not prepared.teachers["teacher"].foreign and learned[0][1] == "both":
        length = len(prepared.prompts[one.prompt].tokens) + len(one.tokens) + 1
    else:
        length = max(len(encode(row, prepared.tokenizer).tokens) for row, _ in learned)
    return f"longer than data.max_tokens {data.max_tokens}" if length > data.max_tokens else None


def _say_steps(work: Work, kept: Sequence[Written]) -> None:
    """How many answers come with worked steps: none, where the marks are not the writer's."""
    marks = work.recipe.data.reasoning
    if marks is not None and kept:
        count = sum(bool((split_reasoning(one.text, marks)[0] or "").strip()) for one in kept)
        work.run.console.say(f"{count} of {len(kept)} kept answers hold worked steps before {marks.close!r}")


def _nll(work: Work) -> Callable[[Sequence[Written]], np.ndarray]:
    """Mean nats a token under the teacher, behind what the writer was shown."""
    prepared = work.prepared
    files = prepared.teachers["teacher"]
    tokenizer = files.tokenizer if files.foreign else prepared.tokenizer

    def rows(one: Written) -> Encoded:
        if not one.tokens:  # a server's
            return encode(answered(one.row, one.text), tokenizer)
        shown = prepared.prompts[one.prompt].shown
        end = [] if one.end is None else [one.end]
        return Encoded([*shown, *one.tokens, *end], max(1, len(shown)))

    def nll(written: Sequence[Written]) -> np.ndarray:
        encoded = [rows(one) for one in written]
        model, progress = work.teacher().model, work.run.progress
        return nll_of_rows(model, encoded, files.vocabulary, title="perplexity", progress=progress)

    return nll


def _advice(dropped: dict[str, int]) -> str:
    """What to change so that more is kept, by what took most."""
    most = max(dropped, key=dropped.__getitem__)
    if most.startswith("unfinished"):
        return "raise `generate.max_tokens`?"
    if most.startswith("longer"):
        return "raise `data.max_tokens`?"
    if most.startswith("no answer"):
        return "raise `generate.max_tokens`, or check the marks of `data.reasoning`?"
    if most in ("empty", "refused"):
        return "is the prompt what the writer expects?"
    return f"loosen `generate.filters.{most}`?"
