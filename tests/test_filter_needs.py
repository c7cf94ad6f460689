"""What is wrong with filters is said before a weight is read, in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import workshop
from tiny import tiny_recipe

from mlx_distill import recipe
from mlx_distill.data.rows import Row
from mlx_distill.errors import DataError, DistillError, MissingExtra, RecipeError
from mlx_distill.filters import check_filters, determining
from mlx_distill.filters.language import load_detector
from mlx_distill.preflight import prepare

QUESTION = Row(prompt="How many legs has a dog?", origin="prompts:1")
SUM = Row(prompt="def f(a):\n", tests=("assert f(1) == 2",), origin="prompts:2")
HELD = Row(prompt="one two three four five", completion="six", origin="test:1")


def decoded(filters: dict[str, Any], **generate: Any) -> recipe.Recipe:
    tree = {
        "name": "sift",
        "student": {"model": "student"},
        "teacher": {"model": "embedded"},
        "data": {"prompts": "prompts.jsonl"},
        "generate": {"filters": filters, **generate},
        "objective": {"cross_entropy": {}},
        "train": {"steps": 1},
    }
    if generate.pop("without_prompts", False):
        tree["data"] = {"train": "train.jsonl"}
        tree["generate"] = {"filters": filters}
    return recipe.decode(tree)


def check(filters: dict[str, Any], prompts: list[Row], held_out: list[Row] = []) -> None:  # noqa: B006
    check_filters(decoded(filters), {"prompts": prompts, "valid": held_out, "test": []})


def test_what_can_be_done_passes() -> None:
    everything = {"language": "en", "duplicates": 0.8, "decontaminate": 5, "verified": True}
    check(everything, [SUM, Row(prompt="?", references=("4",))], [HELD])
    check({}, [QUESTION])


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        (
            {"language": "xx"},
            RecipeError,
            r"`generate\.filters\.language` 'xx': the detector knows af, am, .*en",
        ),
        (
            {"decontaminate": 5},
            RecipeError,
            r"compares with `data\.valid` and `data\.test`, and both are missing",
        ),
        ({"verified": True}, DataError, r"^prompts:1: `generate\.filters\.verified` needs `tests` or"),
    ],
)
def test_what_cannot_be_done_is_refused(
    filters: dict[str, Any], error: type[DistillError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        check(filters, [SUM, QUESTION])
    assert "\n" not in str(caught.value)


def test_held_out_texts_that_are_all_too_short_are_refused() -> None:
    with pytest.raises(DataError, match=r"decontaminate` 6: no text of .* has 6 words; lower it"):
        check({"decontaminate": 6}, [QUESTION], [HELD])


def test_a_test_that_is_not_understood_is_refused_before_the_teacher_works() -> None:
    with pytest.raises(DataError, match="prompts:9: the tests call no function"):
        check({"verified": True}, [Row(prompt="?", tests=("assert f",), origin="prompts:9")])


@pytest.mark.parametrize(
    ("package", "filters"),
    [("py3langid", {"language": "en"}), ("datasketch", {"duplicates": 0.8})],
)
def test_a_missing_package_is_said_before_the_teacher_works(
    package: str, filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_detector.cache_clear()
    for name in [*sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'mlx-distill\[filters\]'"):
        check(filters, [QUESTION])
    check({"duplicates": 1.0, "stubs": True}, [QUESTION])  # those need none


@pytest.mark.parametrize(
    ("filters", "generate", "message"),
    [
        (
            {"language": "english"},
            {},
            "`generate.filters.language`: two letters, as in ISO 639-1, such as en",
        ),
        ({"stubs": True}, {"without_prompts": True}, "`generate.filters` look at answers to `data.prompts`"),
        ({"min_tokens": 9, "max_tokens": 8}, {}, "more than `generate.filters.max_tokens`: no answer passes"),
        ({"min_tokens": 9}, {"max_tokens": 8}, "more than `generate.max_tokens`: no answer passes"),
        ({"perplexity": 0.5}, {}, "`generate.filters.perplexity` 0.5: none is less than 1"),
        ({"duplicates": 0.2}, {}, "`generate.filters.duplicates` 0.2: from 0.3 to 1"),
        ({"duplicates": 1.2}, {}, "`generate.filters.duplicates`"),
        ({"repetition": 0}, {}, "`generate.filters.repetition`"),
        ({"repetitions": 0.5}, {}, "did you mean `generate.filters.repetition`?"),
    ],
)
def test_wrong_filters_stop_the_recipe(
    filters: dict[str, Any], generate: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        decoded(filters, **generate)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bounds_that_leave_one_length_are_fine() -> None:
    assert decoded({"min_tokens": 8, "max_tokens": 8}, max_tokens=8).generate.filters.min_tokens == 8


def test_what_decides_about_answers_belongs_to_the_fingerprint() -> None:
    """And what does not decide stays out of it: held-out rows may differ between runs of one student."""
    rows = {"prompts": [SUM], "valid": [HELD], "test": [QUESTION]}
    others = {"prompts": [QUESTION], "valid": [QUESTION], "test": [QUESTION]}
    assert determining(decoded({"stubs": True, "duplicates": 0.8}), rows) == []
    for filters, count in (
        ({"decontaminate": 2}, 1),
        ({"verified": True}, 1),
        ({"decontaminate": 2, "verified": True}, 2),
    ):
        found = determining(decoded(filters), rows)
        assert len(found) == count
        assert found == determining(decoded(filters), dict(rows))
        assert found != determining(decoded(filters), others)
    slower = decoded({"verified": True}).model_copy(update={"evaluate": recipe.Evaluate(seconds=9.0)})
    assert determining(slower, rows) != determining(decoded({"verified": True}), rows)


def test_preflight_asks_for_all_of_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run whose filters read held-out rows is another one when those rows change."""
    monkeypatch.chdir(workshop.make(tmp_path))
    other = {"prompt": "one two three four five", "completion": "six"}
    Path("other.jsonl").write_text(json.dumps(other) + "\n", encoding="utf-8")

    def fingerprint(filters: dict[str, Any], valid: str | None) -> str:
        data = {"prompts": "good.jsonl", "valid": valid, "max_tokens": 64}
        found = tiny_recipe(
            teacher={"model": "teacher"}, data=data, generate={"filters": filters}, evaluate={"tasks": []}
        )
        return prepare(found).fingerprint

    with pytest.raises(RecipeError, match="'xx': the detector knows"):
        fingerprint({"language": "xx"}, None)
    with pytest.raises(RecipeError, match="both are missing"):
        fingerprint({"decontaminate": 3}, None)
    with pytest.raises(DataError, match=r"good\.jsonl:1: .*needs `tests` or `references`"):
        fingerprint({"verified": True}, None)
    plain = {"stubs": True}
    assert fingerprint(plain, "good.jsonl") == fingerprint(plain, "other.jsonl")
    assert fingerprint({"decontaminate": 3}, "good.jsonl") != fingerprint({"decontaminate": 3}, "other.jsonl")
