"""Answers that are wrong: their program fails a test, or they equal no reference."""

from collections.abc import Sequence

from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError
from mlx_distill.evaluate.code import check_tests, pass_at_1
from mlx_distill.evaluate.exact import equal
from mlx_distill.filters.material import Material
from mlx_distill.written import Written


def verified(written: Sequence[Written], on: bool, material: Material) -> list[str | None]:
    """Answers that fail a test of their row; where it has none, answers that equal no reference.

    Worked steps are left out first. Programs run in the sandbox, several at a time.

    Raises:
        DataError: a row with neither tests nor references, or with a test that is not understood.
        SandboxError: programs are to be run, nothing holds them here, and not `material.unsafe`.
    """
    for one in written:
        check_verifiable(one.row)
    answers = [material.answer(one) for one in written]
    found = [_why_no_reference(one.row, answer) for one, answer in zip(written, answers, strict=True)]
    places = [i for i, one in enumerate(written) if one.row.tests]
    if places:
        _, verdicts = pass_at_1(
            [written[i].row for i in places],
            [answers[i] for i in places],
            seconds=material.seconds,
            whole=True,  # all of it would be learned
            unsafe=material.unsafe,
            progress=material.progress,
        )
        for i, (score, why) in zip(places, verdicts, strict=True):
            found[i] = None if score else why
    return found


def check_verifiable(row: Row) -> None:
    """Refuse a row that says nothing about which answers are right.

    Raises:
        DataError: neither tests nor references, or a test that is not understood.
    """
    if not row.tests and not row.references:
        raise DataError(
            f"{row.origin}: `generate.filters.verified` needs `tests` or `references`; it has neither"
        )
    if row.tests:
        check_tests(row)


def _why_no_reference(row: Row, answer: str) -> str | None:
    if any(equal(answer, reference) for reference in row.references):
        return None
    return f"{answer[:60]!r} equals none of {len(row.references)} references"
