"""HumanEval and MBPP as published: their own solutions pass, wrong ones do not, bad files are refused."""

import ast
import functools
import gzip
import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from mlx_distill.data.rows import Row
from mlx_distill.data.template import encode_prompt
from mlx_distill.errors import DataError, MissingExtra, NotFound
from mlx_distill.evaluate import code, published
from mlx_distill.evaluate.check_function import split_check
from mlx_distill.evaluate.judging import Plan, plan
from mlx_distill.evaluate.programs import open_function
from mlx_distill.evaluate.published import Published

# Solutions of MBPP in function format that fail their own tests, as that file's SOURCE.md has them.
FAILING = {56, 64, 160, 341, 349, 367, 596, 601, 607, 631, 642, 899, 927, 966, 967}
FILES = {
    "humaneval": "humaneval/humaneval.jsonl",
    "function format": "mbpp/mbpp_function_format.jsonl",
    "sanitized": "mbpp/sanitized_mbpp.jsonl",
}


def read(shared: Path, name: str, limit: int | None = None) -> Published:
    return _read(shared, name, limit, published.MBPP_TEST)


@functools.cache
def _read(shared: Path, name: str, limit: int | None, ids: range) -> Published:
    assert ids == published.MBPP_TEST
    task = "humaneval" if name == "humaneval" else "mbpp"
    return published.published(task, str(shared / "data" / FILES[name]), limit)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """All problems of MBPP, those for training too."""
    monkeypatch.setattr(published, "MBPP_TEST", range(1, 975))


def failed(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, str | None]:
    """Why answers failed, by the place of their problem."""
    _, verdicts = code.pass_at_1(rows, answers, seconds=10.0)
    return {row.origin: why for row, (score, why) in zip(rows, verdicts, strict=True) if score == 0.0}


def number(origin: str) -> int:
    """The line of a problem, which in these files is its id."""
    return int(origin.rpartition(":")[2])


def solution(row: Row) -> str:
    """The reference solution, as a base model would write it."""
    assert row.completion is not None
    return row.completion


def chat_solution(row: Row) -> str:
    """The same as a chat model would."""
    assert row.messages is not None
    return row.messages[-1]["content"]


MUTATION = """
def _mutated(right):
    def wrong(*positional, **named):
        value = right(*positional, **named)
        if value is None or isinstance(value, bool):
            return not value
        if isinstance(value, (int, float, complex)):
            return value + 1 if isinstance(value, int) else 2 * value + 1
        if isinstance(value, str):
            return value + "a"
        if isinstance(value, (list, tuple)):
            return type(value)([*value, 1])
        return value | ({"a": 1} if isinstance(value, dict) else {"a"})
    return wrong
NAME = _mutated(NAME)
"""


def off_by_one(row: Row) -> str:
    """The reference solution, with its value changed by little: a number, a letter, an element, a truth."""
    name = open_function(row.prompt or "")[1]
    block = chat_solution(row).removesuffix("```")
    if not name:  # MBPP as Google has it: the function that the tests call
        body = ast.parse(block.removeprefix("```python\n")).body
        names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        name = next(one for one in plan(row).names if one in names)
    return f"{block}{MUTATION.replace('NAME', name)}```"


# --- the solutions that were published, and wrong ones ---


@pytest.mark.parametrize("wrote", [solution, chat_solution])
def test_every_solution_of_humaneval_passes(shared: Path, wrote: Callable[[Row], str]) -> None:
    rows = read(shared, "humaneval").rows
    assert len(rows) == 164
    assert failed(rows, [wrote(row) for row in rows]) == {}


@pytest.mark.parametrize("body", ["    return None\n", "    return True\n", None])
def test_no_wrong_answer_solves_a_problem_of_humaneval(shared: Path, body: str | None) -> None:
    rows = read(shared, "humaneval").rows
    answers = [off_by_one(row) if body is None else body for row in rows]
    assert len(failed(rows, answers)) == len(rows)


def test_a_part_of_mbpp(shared: Path, whole: None) -> None:
    """Every tenth problem, and all that fail: those fail and the others pass."""
    rows = [
        row
        for row in read(shared, "function format").rows
        if number(row.origin) % 10 == 0 or number(row.origin) in FAILING
    ]
    found = failed(rows, [solution(row) for row in rows])
    assert {number(origin) for origin in found} == FAILING
    good = [row for row in rows if number(row.origin) not in FAILING]
    assert len(failed(good, [off_by_one(row) for row in good])) == len(good)


@pytest.mark.slow
@pytest.mark.parametrize("wrote", [solution, chat_solution])
def test_959_of_974_solutions_of_mbpp_pass(shared: Path, whole: None, wrote: Callable[[Row], str]) -> None:
    rows = read(shared, "function format").rows
    found = failed(rows, [wrote(row) for row in rows])
    assert {number(origin) for origin in found} == FAILING
    assert len(rows) - len(found) == 959


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what people wrote, such as "\\w"
@pytest.mark.parametrize("wrote", [solution, chat_solution])
def test_every_solution_of_sanitized_mbpp_passes(
    shared: Path, whole: None, wrote: Callable[[Row], str]
) -> None:
    rows = read(shared, "sanitized").rows
    assert len(rows) == 426
    assert failed(rows, [wrote(row) for row in rows]) == {}
    assert len(failed(rows, [off_by_one(row) for row in rows])) == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "function format", "sanitized"])
def test_solutions_of_other_problems_do_not_pass(shared: Path, name: str) -> None:
    """Under the names that the tests call, so that it is values that fail and no names."""
    rows = read(shared, name).rows
    answers = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        mine, its = (open_function(one.prompt or "")[1] or plan(one).names[0] for one in (row, other))
        answers.append(f"{chat_solution(other).removesuffix('```')}\n{mine} = {its}\n```")
    assert len(rows) - len(failed(rows, answers)) <= 0.02 * len(rows)


# --- how they are judged ---


def way(found: Plan) -> str:
    return "compared" if not found.executed else "refereed" if found.weaker is None else "within"


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("humaneval", {"compared": 157, "refereed": 7}),
        ("function format", {"compared": 970, "refereed": 4}),
        ("sanitized", {"compared": 426}),
    ],
)
def test_how_many_problems_are_judged_in_which_way(
    shared: Path, whole: None, name: str, ways: dict[str, int]
) -> None:
    rows = read(shared, name).rows
    assert Counter(way(plan(row)) for row in rows) == ways
    assert all(row.loose and row.task == "code" for row in rows)


def test_helpers_that_a_prompt_defines_judge_in_the_referee(shared: Path) -> None:
    """HumanEval/32 compares with `poly`, which a program could otherwise make return 0."""
    row = read(shared, "humaneval").rows[32]
    cheat = "```python\ndef poly(xs, x):\n    return 0\ndef find_zero(xs):\n    return 0\n```"
    assert list(failed([row], [cheat])) == [row.origin]
    assert "def poly" in (row.setup or "")


def test_random_tests_are_the_same_at_every_run(shared: Path) -> None:
    drawn = [row for row in read(shared, "humaneval").rows if "rand" in (row.setup or "")]
    assert len(drawn) == 4
    for row in drawn:
        assert (row.setup or "").startswith("import random\nrandom.seed(0)\n")


def test_a_check_is_split_where_its_asserts_stand_alone() -> None:
    prompt = "import math\ndef helper(x):\n    return x\ndef f(x):\n"
    test = (
        "METADATA = {'author': 'x'}\n"
        "def check(candidate):\n"
        "    assert candidate(1) == 2, 'first: ' + str(candidate(1))\n"
        "    assert True, 'never'\n"
        "    for x in range(3):\n        assert candidate(x) == helper(x)\n"
    )
    tests, setup = split_check(prompt, "f", test, "here")
    assert tests == ("assert f(1) == 2", "check(f)")
    assert setup is not None and setup.startswith(
        "import math\ndef helper(x):\n    return x\ndef check(candidate)"
    )
    assert "METADATA" not in setup and "candidate(1)" not in setup and "helper(x)" in setup
    early = "def check(candidate):\n    if candidate(0):\n        return\n    assert candidate(1) == 2\n"
    assert split_check("def f(x):\n", "f", early, "here")[0] == ("check(f)",)  # what stands first may end it
    assert split_check("def f(x):\n", "f", "def check(g):\n    assert g(1) == 2\n", "here") == (
        ("assert f(1) == 2",),
        None,
    )


# --- what a model is asked ---


def test_prompts_for_a_base_model_and_for_a_chat_model(shared: Path) -> None:
    row = read(shared, "humaneval").rows[0]
    assert row.prompt is not None and row.messages is not None
    assert row.prompt.startswith("from typing import List\n\n\ndef has_close") and row.prompt.endswith(
        '"""\n'
    )
    asked = row.messages[0]["content"]
    assert asked.startswith("Complete this Python function.") and asked.endswith(
        f"```python\n{row.prompt}```"
    )
    row = read(shared, "sanitized").rows[0]
    assert row.prompt is not None and row.messages is not None
    assert row.prompt.startswith('"""\nWrite a ') and row.prompt.endswith(f'{row.tests[0].strip()}\n"""\n')
    assert f"```python\n{row.tests[0].strip()}\n```" in row.messages[0]["content"]
    assert row.tests[1] not in row.prompt + row.messages[0]["content"]


def test_the_template_decides_which_prompt_a_model_reads(tmp_path: Path) -> None:
    """Without one the text to go on with; with one the words, and not the solution that stands behind."""
    (tmp_path / "one.jsonl").write_text(lines(CHECKED), encoding="utf-8")
    row = published.published("humaneval", str(tmp_path / "one.jsonl"), None).rows[0]
    tokenizer = tiny_tokenizer()
    assert row.prompt == CHECKED["prompt"] and row.messages is not None
    assert encode_prompt(row, tokenizer) == encode_prompt(Row(prompt=row.prompt), tokenizer)
    tokenizer.has_chat_template = True
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    asked, solution = row.messages
    assert encode_prompt(row, tokenizer) == encode_prompt(Row(messages=(asked,)), tokenizer)
    assert asked["role"] == "user" and "return x + 1" in solution["content"]


def test_the_version_names_prompts_problems_and_a_digest(shared: Path) -> None:
    whole, few = read(shared, "humaneval"), read(shared, "humaneval", limit=3)
    assert whole.version == "humaneval 1, HumanEval, all ids, 164 problems, digest 41244ba3"
    assert few.version.startswith("humaneval 1, HumanEval, all ids, 3 problems, digest ")
    assert few.version[-8:] != whole.version[-8:] and few.rows == whole.rows[:3]
    assert "mbpp 1, function format, ids 11-510, 500 problems" in read(shared, "function format").version
    assert "mbpp 1, sanitized, ids 11-510, 257 problems" in read(shared, "sanitized").version


# --- files ---

FULL = {
    "task_id": 11,
    "text": 'Write a """quoted""" function.',
    "code": "def f(x):\r\n  return x + 1",
    "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
    "test_setup_code": "",
    "challenge_test_list": ["assert f(9) == 0"],
}
CHECKED = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """One more."""\n',
    "entry_point": "f",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}


def lines(*objects: Any) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


def test_mbpp_as_google_first_published_it(tmp_path: Path) -> None:
    tree = {
        **FULL,
        "task_id": 12,
        "code": "class Node:\n  def __init__(self, v):\n    self.v = v\ndef f(n):\n  return n.v",
        "test_list": ["assert f(root) == 3"],
        "test_setup_code": "root = Node(3)",
    }
    (tmp_path / "mbpp.jsonl").write_text(lines({**FULL, "task_id": 7}, FULL, tree), encoding="utf-8")
    found = published.published("mbpp", str(tmp_path / "mbpp.jsonl"), None)
    assert found.version.startswith("mbpp 1, full, ids 11-510, 2 problems")  # 7 is an example for prompts
    assert failed(found.rows, [solution(row) for row in found.rows]) == {}
    assert len(failed(found.rows, [off_by_one(row) for row in found.rows])) == 2
    assert found.rows[0].prompt == "\"\"\"\nWrite a '''quoted''' function.\nassert f(1) == 2\n\"\"\"\n"
    assert found.rows[0].tests == ("assert f(1) == 2", "assert f(2) == 3")  # the challenges are not counted


def test_a_file_whose_ids_are_none_of_the_test_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(
        json.dumps([{**FULL, "task_id": i} for i in (601, 602)]), encoding="utf-8"
    )
    found = published.published("mbpp", str(tmp_path / "mine.json"), None)
    assert len(found.rows) == 2 and "all ids" in found.version
    assert found.rows[1].origin == f"{tmp_path}/mine.json, problem 2"


def test_a_gzipped_file(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines(CHECKED).encode()))
    assert len(published.published("humaneval", str(tmp_path / "HumanEval.jsonl.gz"), None).rows) == 1
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(CHECKED).encode())[:-12])
    with pytest.raises(DataError, match="cut.jsonl.gz: cannot be read"):
        published.published("humaneval", str(tmp_path / "cut.jsonl.gz"), None)


def without(fields: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in keys}


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("humaneval", "", "empty; problems as one JSON object a line"),
        ("humaneval", "[]", "an empty list"),
        ("humaneval", "{", ":1: no JSON: "),
        ("humaneval", "[{}, \n{]", "no JSON: .* at line 2"),
        ("humaneval", lines(CHECKED, 3), ":2: a JSON object is expected; got '3'"),
        (
            "humaneval",
            lines({"a": 1, "b": 2}),
            ":1: no format known: its keys are `a`, `b`; known: HumanEval",
        ),
        (
            "humaneval",
            lines(FULL),
            ":1: no format known: .*known: HumanEval with task_id, prompt, entry_point",
        ),
        (
            "humaneval",
            lines(CHECKED, without(CHECKED, "entry_point")),
            ":2: `entry_point` is missing, for HumanEval; known: HumanEval with task_id, prompt, ",
        ),
        (
            "mbpp",
            lines(without(FULL, "test_list")),
            ":1: `test_list` is missing, for full; known: function format",
        ),
        ("mbpp", lines(without(FULL, "task_id")), ":1: `task_id` is missing"),
        (
            "mbpp",
            lines({**FULL, "test_list": "assert f(1)"}),
            ":1: `test_list` is a list of strings; got 'assert",
        ),
        ("mbpp", lines({**FULL, "test_list": []}), ":1: `test_list` is empty"),
        ("mbpp", lines({**FULL, "task_id": True}), ":1: `task_id` is a number or a string; got 'True'"),
        ("humaneval", lines({**CHECKED, "prompt": 3}), ":1: `prompt` is a string; got '3'"),
        ("humaneval", lines(CHECKED, CHECKED), ":2: `task_id` HumanEval/0 is also that of .*:1$"),
        (
            "mbpp",
            lines({**FULL, "test_list": ["assert f(1 == 2"]}),
            ":1: test 'assert f.* is not readable as Python",
        ),
        ("mbpp", lines({**FULL, "test_list": ["assert 1 == 1"]}), ":1: the tests call no function"),
        ("humaneval", lines({**CHECKED, "test": "def check(:"}), ":1: `test` is not readable as Python"),
        ("humaneval", lines({**CHECKED, "test": "assert f(1)"}), ":1: `test` has no function `check"),
        (
            "humaneval",
            lines({**CHECKED, "test": "def check(candidate):\n    assert g(1) == 2\n"}),
            ":1: the tests never call `f`",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, task: Any, text: str, message: str | None) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        published.published(task, str(path), None)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_source_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "humaneval.jsonl").write_text(lines(CHECKED), encoding="utf-8")
    with pytest.raises(NotFound, match=r"evaluate.files.humaneval: .*did you mean .*humaneval.jsonl"):
        published.published("humaneval", str(tmp_path / "humanevil.jsonl"), None)
    with pytest.raises(DataError, match=r"evaluate.files.mbpp: .* is a folder; name a file in it"):
        published.published("mbpp", str(tmp_path), None)


# --- the Hub ---


def test_the_hub_serves_parquet_through_the_package_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def folder(name: str, *, where: str) -> Path:
        asked.append(f"{where} {name}")
        return tmp_path

    monkeypatch.setattr("mlx_distill.hub.dataset_folder", folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtra, match=r"evaluate.files.mbpp: .*pip install 'mlx-distill\[datasets\]'; or"
    ):
        published.published("mbpp", None, None)
    loaded: list[Any] = []
    package = types.ModuleType("datasets")
    package.load_dataset = lambda *a, **k: loaded.append((a, k)) or [FULL]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    found = published.published("mbpp", None, None)
    assert found.rows[0].origin == "google-research-datasets/mbpp/test:1"
    assert loaded == [(("google-research-datasets/mbpp",), {"split": "test"})]
    assert asked == ["evaluate.files.mbpp google-research-datasets/mbpp"] * 2
    (tmp_path / "test.jsonl").write_text(
        lines(CHECKED), encoding="utf-8"
    )  # no package is needed for JSON lines
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert published.published("humaneval", "me/mine", None).rows[0].origin == "me/mine/test.jsonl:1"
