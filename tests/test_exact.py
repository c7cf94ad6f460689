"""Exact match: what counts as the same answer, and what the numbers are."""

import pytest

from mlx_distill.data.rows import Row, parse_row
from mlx_distill.errors import DataError
from mlx_distill.evaluate.exact import equal, exact_match


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("4", "4", True),
        (" 4\n", "4", True),
        ("New\n  York", "New York", True),
        ("[1, 2]", "[1,2]", False),  # where there is white space counts
        ("4.", "4", False),
        ("york", "York", False),
        ("4.0", "4", False),
        ("", "4", False),
        ("the answer is 4", "4", False),
    ],
)
def test_only_white_space_is_forgiven(answer: str, reference: str, same: bool) -> None:
    assert equal(answer, reference) == equal(reference, answer) == same


def test_any_reference_is_right() -> None:
    row = Row(prompt="a", references=("4", "four"), task="exact")
    metrics, scores = exact_match([row] * 4, ["four", "4", "five", "4 four"])
    assert scores == [1, 1, 0, 0] and metrics == {"exact_match": 0.5}


def test_rows_that_say_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no rows with `references`"):
        exact_match([], [])
    with pytest.raises(DataError, match="^x:3: no `references` to compare"):
        exact_match([Row(prompt="a", completion="4", task="exact", origin="x:3")], ["4"])


def test_rows_of_a_file_name_the_task() -> None:
    fields = {"prompt": "2 + 2?", "references": ["4"], "task": "exact"}
    assert parse_row(fields, "x:1").task == "exact"
    assert parse_row({**fields, "task": None}, "x:1").task == "summary"
    with pytest.raises(DataError, match="^x:1: `task` exact compares with `references`; add them"):
        parse_row({"prompt": "2 + 2?", "task": "exact"}, "x:1")
