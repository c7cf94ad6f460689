"""pass@1: the share of answers whose program passes all the tests of its row."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate import sandbox
from mlx_distill.evaluate.judging import Plan, plan, short, why_unequal
from mlx_distill.evaluate.programs import program_of
from mlx_distill.progress import Progress, silent


def pass_at_1(
    rows: Sequence[Row],
    answers: Sequence[str],
    *,
    seconds: float,
    workers: int | None = None,
    unsafe: bool = False,
    whole: bool = False,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[tuple[float, str | None]]]:
    """Run each answer against the tests of its row.

    Args:
        answers: one a row, as the model wrote them.
        seconds: wall time of one program with all of its tests.
        workers: programs that run at once; None: one a core.
        unsafe: run them even where nothing holds them back.
        whole: judge all of an answer, as `program_of` has it.

    Returns:
        `pass@1`, `problems`, the `sandbox` that ran them, and `weaker`, the number of rows
        some test of which ran inside the program's own process, left out where it is 0; and for each row 1.0
        or 0.0, with the reason of a 0.0, or of a 1.0 that was weakly tested.

    Raises:
        DataError: no rows, or a row whose tests judge nothing.
        SandboxError: nothing holds programs back here, and not `unsafe`.
    """
    if not rows:
        raise DataError("pass@1: no rows with tests to score; give the test split some, or drop the task")
    plans = {place: plan(row) for place, row in {id(row): row for row in rows}.items()}  # each once
    programs = [program_of(row, answer, whole=whole) for row, answer in zip(rows, answers, strict=True)]
    jobs = [_jobs(program, plans[id(row)]) for row, program in zip(rows, programs, strict=True)]
    different = list(dict.fromkeys(job for some in jobs for job in some))  # of many samples most are the same
    ran = sandbox.run(different, seconds=seconds, workers=workers, unsafe=unsafe, progress=progress)
    outcomes = dict(zip(different, ran, strict=True))
    verdicts: list[tuple[float, str | None]] = []
    for row, some in zip(rows, jobs, strict=True):
        why = _why_wrong(plans[id(row)], some, outcomes, row.loose)
        weaker = plans[id(row)].weaker
        verdicts.append((0.0, why) if why else (1.0, weaker and f"weakly tested: {weaker}"))
    share = sum(score for score, _ in verdicts) / len(verdicts)
    metrics = {
        "pass@1": share,
        "problems": len(verdicts),
        "sandbox": sandbox.backend(),
    }
    weak = sum(one.weaker is not None for one in plans.values())
    return metrics | ({"weaker": weak} if weak else {}), verdicts


def check_tests(row: Row) -> None:
    """Refuse a row whose tests could not judge a program.

    Raises:
        DataError: no tests, one that is no Python, or none that uses anything a program could define.
    """
    plan(row)


def _jobs(program: str, tests: Plan) -> list[sandbox.Runnable]:
    """What runs in the sandbox to judge a program: what is asked for values, and what is executed."""
    jobs: list[sandbox.Runnable] = []
    if tests.calls:
        jobs.append(sandbox.Program(f"{program}\n\n{tests.setup}" if tests.inputs else program, tests.calls))
    if tests.executed and tests.weaker is not None:
        jobs.append(sandbox.Within(program, tests.setup, tests.executed))
    elif tests.executed:
        jobs.append(sandbox.Refereed(program, tests.setup, tests.executed, tests.names))
    return jobs


def _why_wrong(
    tests: Plan,
    jobs: Sequence[sandbox.Runnable],
    outcomes: Mapping[sandbox.Runnable, sandbox.Outcome],
    loose: bool,
) -> str | None:
    """The first test that failed and how, None if all held."""
    asked: list[Any] = []
    executed: list[Any] = []
    for job in jobs:
        outcome = outcomes[job]
        if outcome.values is None:
            return outcome.why or "no value"
        (asked if isinstance(job, sandbox.Program) else executed).extend(outcome.values)
    for test in tests.tests:
        value = (executed if test.asked is None else asked).pop(0)
        if test.asked is None:
            if value is not True:
                why = value.why if isinstance(value, sandbox.Failed) else "no verdict"
                return why if why.startswith(test.text[:100]) else f"{short(test.text)}: {why}"
        elif isinstance(value, sandbox.Failed):
            return f"{short(test.asked.call)}: {value.why}"
        elif (why := why_unequal(test.asked, value, loose)) is not None:
            return why
    return None
