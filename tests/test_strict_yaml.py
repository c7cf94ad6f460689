"""YAML as people mean it: YAML 1.2's scalars, each key once, and mistakes with their place."""

from typing import Any

import pytest

from mlx_distill.errors import RecipeError
from mlx_distill.strict_yaml import parse_value, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # YAML 1.1, and so PyYAML, has a string here
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("012", 12),  # there: ten
        ("+5", 5),
        ("1_000", "1_000"),  # there: a thousand
        ("0x10", "0x10"),
        ("12:30", "12:30"),  # there: 750
        ("no", "no"),  # there: false, as are off and n
        ("on", "on"),
        ("yes", "yes"),
        ("false", False),
        ("True", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),  # there: a date
        (".inf", ".inf"),
        ("=", "="),
        ("'1e-4'", "1e-4"),
        ("[1, two, 3.0]", [1, "two", 3.0]),
        ("{a: {b: no}}", {"a": {"b": "no"}}),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_value(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml: line 3: the key `a` stands twice (first in line 1)"),
        ("a: {b: 1, b: 2}", "r.yaml: line 1: the key `b` stands twice"),
        ('a: 1\nb: "x\\0y"', "r.yaml: line 2: a NUL character; no option takes one"),
        ("a: {1: x}", "r.yaml: line 1: the key 1 is no word; put it in quotes"),
        ("a: {no: x, null: y}", "r.yaml: line 1: the key None is no word"),
        ("? [a]\n: 1", "r.yaml: line 1: the key ['a'] is no word"),
        ("a: [1\nb: 2", "r.yaml: line 2, column 2: not readable as YAML"),
        ("a: 'x", "not readable as YAML (found unexpected end of stream)"),
        ("\ta: 1", "r.yaml: line 1, column 1: not readable as YAML"),
        ("a: *nowhere", "found undefined alias 'nowhere'"),
        ("a: &x [*x]", "recursive"),
        ("a: 1\n---\na: 2", "another document"),
        ("a: \x00", "special characters are not allowed"),
        ("{" * 3000, "nested too deeply"),
        ("<<: 5", "expected a mapping"),
        ("a: !!int x", "no value of its type: invalid literal for int() with base 10: 'x'"),
        ("a: !!float x", "no value of its type: could not convert string to float"),
        ("a: !!bool maybe", "no value of its type: 'maybe'"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("", "r.yaml: a recipe is a mapping such as `name: mine`; got 'None'"),
        ("- 1", "a recipe is a mapping"),
        ("just words", "got 'just words'"),
    ],
)
def test_mistakes_are_one_line_with_their_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    said = str(caught.value)
    assert said.startswith("r.yaml: ")
    assert message in said
    assert "\n" not in said


def test_a_merged_mapping_may_be_overruled() -> None:
    text = "base: &base {a: 1, b: 2}\nmine: {<<: *base, b: 3}\n"
    assert parse_yaml(text, "r.yaml")["mine"] == {"a": 1, "b": 3}
    with pytest.raises(RecipeError, match="line 2: the key `b` stands twice"):  # that is still no excuse
        parse_yaml(text.replace("b: 3", "b: 3, b: 4"), "r.yaml")


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_yaml("\ufeffa: 1", "r.yaml") == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)),
        "a0: &a0 {k: x}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(40)),
        "a: &a [" + "x, " * 2000 + "x]\nb: [" + "*a, " * 600 + "*a]",
    ],
    ids=["lists", "merged", "flat"],
)
def test_a_few_lines_do_not_become_millions_of_values(text: str) -> None:
    """PyYAML shares what an alias names; who walks the tree, as a message about it does, would not."""
    with pytest.raises(RecipeError, match="r.yaml: its aliases make more than 200000 values of it"):
        parse_yaml(text, "r.yaml")


def test_aliases_in_reason_are_fine() -> None:
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: *a}", "r.yaml")["c"] == {"b": 1, "d": {"b": 1}}


def test_a_file_that_is_no_recipe_is_not_read_to_its_end() -> None:
    with pytest.raises(RecipeError, match="a recipe has 200000 at most"):
        parse_yaml("a: 1\n" * 300_000, "r.yaml")
