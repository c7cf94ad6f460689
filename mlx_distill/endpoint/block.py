"""A block of answers from a server: many requests under way, results in the order of the rows."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.endpoint.exchange import Said, bodies, path_of, read
from mlx_distill.endpoint.replies import Refused
from mlx_distill.endpoint.server import Server
from mlx_distill.errors import RecipeError, Stopped
from mlx_distill.options import Generate, Reasoning
from mlx_distill.progress import Progress, silent
from mlx_distill.written import Written

Question = tuple[int, Row, int]  # index of the prompt, the row, which of its answers
Asked = tuple[Question, list[dict[str, Any]]]  # with the forms of its request

MISSES = 8  # rows refused, while none was answered, after which it is the recipe that is wrong


def write_block(
    options: Generate,
    rows: Sequence[Question],
    *,
    seed: int,
    progress: Progress = silent,
    server: Server | None = None,
    reasoning: Reasoning | None = None,
    examples: Sequence[Row] = (),
    done: Mapping[tuple[int, int], Written] | None = None,
    on_answer: Callable[[Written], None] | None = None,
    title: str = "answers of the server",
) -> list[Written]:
    """The server's answers to these questions, in their order.

    Args:
        server: an open one, so that its pace and what it was found to take hold across blocks; None: one
            for this block.
        reasoning: marks around reasoning that comes in a field of its own; None leaves it out.
        examples: rows with answers that stand before each question.
        done: answers by prompt and sample that an earlier attempt got; they are not asked for again.
        on_answer: told of each new answer at once, in the calling thread, so that none is paid for twice.
            Not of a refusal: when a stopped block goes on, the server may be another.

    Raises:
        DataError: a row that cannot be asked in this way.
        RecipeError: key, url, model or options are such that nothing can be answered.
        Stopped: a request failed for good; what came before it was handed to `on_answer`.
    """
    endpoint = options.endpoint
    assert endpoint is not None  # the recipe was checked for it
    answers = dict(done or {})
    asked = [
        (question, bodies(endpoint, options, question[1], question[2], seed=seed, examples=examples))
        for question in rows
        if (question[0], question[2]) not in answers
    ]
    with ExitStack() as stack:
        server = server or stack.enter_context(Server(endpoint))
        advance = stack.enter_context(progress(title, len(rows), "rows"))
        server.answered = server.answered or bool(answers)
        advance(len(rows) - len(asked))
        started, tokens, unfinished = time.perf_counter(), 0, 0
        outcomes = stack.enter_context(closing(_outcomes(server, asked, reasoning)))
        for (number, row, sample), outcome in outcomes:
            if isinstance(outcome, Refused):
                written = Written(number, sample, row, "", [], False, refused=str(outcome))
            else:
                written = Written(number, sample, row, outcome.text, [], outcome.finished, outcome.mean_nll)
                tokens += outcome.tokens or 0
                unfinished += not outcome.finished
                if on_answer is not None:
                    on_answer(written)
            answers[number, sample] = written
            speed = {"tokens_per_second": tokens / (time.perf_counter() - started), "unfinished": unfinished}
            advance(1, **{column: value for column, value in speed.items() if value})
    return [answers[number, sample] for number, _, sample in rows]


def _outcomes(
    server: Server, asked: Sequence[Asked], reasoning: Reasoning | None
) -> Generator[tuple[Question, Said | Refused], None, None]:
    """Each question with its answer, or with why the server refused it, as they come, `at_once` under way.

    Threads of our own, not a pool's: those of a pool are waited for when the program ends, which would
    hold an interrupted run for as long as the server thinks.
    """
    waiting: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    for one in asked:
        waiting.put(one)
    outcomes: queue.SimpleQueue[tuple[Question, Said | Exception]] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                question, forms = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcomes.put((question, _ask(server, forms, question, reasoning, stop)))
            except Refused as refused:
                outcomes.put((question, refused))
            except Exception as error:  # for the calling thread to raise; behind it, others may be `Halted`
                outcomes.put((question, error))
                stop.set()

    threads = [
        threading.Thread(target=work, daemon=True, name=f"endpoint-{number}")
        for number in range(min(server.options.at_once, len(asked)))
    ]
    failed: Exception | None = None
    here, misses = 0, 0
    try:
        for thread in threads:
            thread.start()
        for _ in asked:
            question, outcome = outcomes.get()
            if isinstance(outcome, Exception) and not isinstance(outcome, Refused):
                failed = outcome
                break
            here += 1
            yield question, outcome
            misses += isinstance(outcome, Refused)
            if not server.answered and misses >= min(MISSES, len(asked)):
                assert isinstance(outcome, Refused)
                failed = RecipeError(
                    f"`generate.endpoint`: {server.options.url} takes none of the requests ({outcome}); "
                    f"change what it names in `generate`; {server.offers()}"
                )
                break
        stop.set()
        for thread in threads:  # what is under way has been paid for
            thread.join()
        while not outcomes.empty():
            question, outcome = outcomes.get()
            if not isinstance(outcome, Exception):
                here += 1
                yield question, outcome
    finally:
        stop.set()
    if isinstance(failed, Stopped):
        raise Stopped(f"{failed}; {here} of {len(asked)} answers asked for are here")
    if failed is not None:
        raise failed


def _ask(
    server: Server,
    forms: Sequence[dict[str, Any]],
    question: Question,
    reasoning: Reasoning | None,
    stop: threading.Event,
) -> Said:
    """One answer, in the first form of the request that the server takes.

    Raises:
        Refused: it takes none.
        Halted, RecipeError, Stopped: as `Server.post`.
    """
    _, row, sample = question
    what = row.origin or f"{row.question()[:40]!r}"
    what = f"{what}, sample {sample}" if sample else what
    why: Refused | None = None
    for number in range(min(server.form, len(forms) - 1), len(forms)):
        try:
            said = server.post(
                path_of(server.options),
                forms[number],
                lambda tree: read(tree, reasoning),
                what=what,
                stop=stop,
            )
        except Refused as error:
            why = why or error
            continue
        server.form, server.answered = number, True
        return said
    assert why is not None
    raise why
