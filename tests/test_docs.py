"""The docs say what the code does: options, commands, links, names, messages.

`python tests/test_docs.py` writes docs/recipe.md anew after a change of options.
"""

import ast
import io
import json
import pkgutil
import re
import shlex
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "recipes").rglob("README.md"))]
each = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])

OPTIONS = [*sorted((ROOT / "mlx_distill" / "options").glob("*.py")), ROOT / "mlx_distill" / "recipe.py"]
NUMBERS = {
    "PositiveInt": "whole number > 0",
    "NonNegativeInt": "whole number >= 0",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number >= 0",
    "float": "number",
    "Share": "number > 0, <= 1",
    "Fraction": "number > 0, < 1",
    "str": "text",
    "bool": "true or false",
    "Source": "[source](#source)",
    "Reasoning": "[reasoning](#datareasoning)",
    "Filters": "[filters](#generatefilters)",
    "Endpoint": "[endpoint](#generateendpoint)",
    "OnPolicy": "[on_policy](#generateon_policy)",
    "Curriculum": "[curriculum](#traincurriculum)",
    "Shape": "[shape](#studentshape)",
    "NewTokenizer": "[tokenizer](#studenttokenizer)",
    "Prune": "[prune](#studentprune)",
    "KeptSizes": "[sizes](#studentprunesizes)",
    "Sparsity": "[sparsity](#studentprunesparsity)",
    "Grid": "[quantize](#teacherquantize)",
    "Bits": "2, 3, 4, 5, 6, 8",
}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
PLACES = {  # where a class of options stands in a recipe, in the order of a batch
    "Recipe": "",
    "Student": "student",
    "Shape": "student.shape",
    "NewTokenizer": "student.tokenizer",
    "Prune": "student.prune",
    "KeptSizes": "student.prune.sizes",
    "Sparsity": "student.prune.sparsity",
    "Teacher": "teacher",
    "Grid": "teacher.quantize",
    "Data": "data",
    "Source": "source",
    "Reasoning": "data.reasoning",
    "Generate": "generate",
    "Filters": "generate.filters",
    "Endpoint": "generate.endpoint",
    "OnPolicy": "generate.on_policy",
    "Train": "train",
    "Curriculum": "train.curriculum",
    "Quantize": "quantize",
    "Evaluate": "evaluate",
    "Export": "export",
    "Compress": "compress",
}
INTRODUCTION = """\
# Every option of a recipe

Made from `mlx_distill/options/` by `python tests/test_docs.py`; a test compares the two.

A recipe is strict YAML. Its top-level keys are the modules that a batch meets, in that order. An unknown,
missing, doubled or wrongly typed key stops the run before a weight is read, and all mistakes are said at
once. Any option can be given on the command line, behind the recipe:

    mlx-distill run quickstart train.steps=50 seed=1 name=short
    mlx-distill plan quickstart train.steps=50      # the resolved recipe, every default written out

0 or null turns a thing off. Losses are in nats, times in seconds.

## objective

A mapping from losses to their options; at least one. Each loss has a `weight` (number > 0, 1.0 where it is
left out) and options of its own: [losses.md](losses.md).
"""


def options_page() -> str:
    """docs/recipe.md, from the classes of the options, their docstrings and the comments of their fields."""
    classes: dict[str, ast.ClassDef] = {}
    comments: dict[ast.stmt, str] = {}
    for path in OPTIONS:
        source = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        said = {
            token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name != "Section":
                classes[node.name] = node
                comments |= {field: said.get(field.end_lineno or field.lineno, "") for field in node.body}
    assert set(classes) == {*PLACES, "Term", "Sampling"}, "a section without its place in docs/recipe.md"
    parts = [INTRODUCTION]
    for name, place in PLACES.items():
        node = classes[name]
        lines = [f"## {place or 'The top level'}\n", ast.get_docstring(node) or "", ""]
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for field in _fields(node, classes):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(field.target, ast.Name)
                meaning = comments[field]
                type_, default = _type_of(field), _default_of(field)
                lines.append(f"| `{field.target.id}` | {type_} | {default} | {meaning} |".replace("  ", " "))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.stmt]:
    """What a class holds, behind what it inherits; a field given anew keeps its first place."""
    found: dict[str, ast.stmt] = {}
    for base in [classes[ast.unparse(one)] for one in node.bases if ast.unparse(one) in classes]:
        found |= {ast.unparse(f.target): f for f in base.body if isinstance(f, ast.AnnAssign)}
    return list((found | {ast.unparse(getattr(f, "target", f)): f for f in node.body}).values())


def _type_of(field: ast.AnnAssign) -> str:
    text = _shown(field.annotation)
    for keyword in field.value.keywords if isinstance(field.value, ast.Call) else []:
        if keyword.arg in BOUNDS:
            text += f", {BOUNDS[keyword.arg]} {ast.unparse(keyword.value)}"
    return text


def _shown(node: ast.expr) -> str:
    match node:
        case ast.BinOp(left=left, right=right):
            return f"{_shown(left)} or {_shown(right)}"
        case ast.Constant(None):
            return "null"
        case ast.Subscript(value=ast.Name("Literal"), slice=ast.Tuple(elts)):
            return ", ".join(f"`{ast.literal_eval(choice)}`" for choice in elts)
        case ast.Subscript(value=ast.Name("Literal"), slice=ast.Constant(only)):
            return f"`{only}`"
        case ast.Subscript(value=ast.Name("Annotated"), slice=ast.Tuple([inner, *_])):
            return _shown(inner)
        case ast.Subscript(value=ast.Name("list"), slice=inner):
            return f"list of {_shown(inner)}"
        case ast.Subscript():
            return "mapping"
    name = ast.unparse(node)
    places = {key: f"[{place}](#{place})" for key, place in PLACES.items() if place}
    places["Self"] = "the same"
    return NUMBERS.get(name) or places[name]


def _default_of(field: ast.AnnAssign) -> str:
    match field.value:
        case None:
            return "needed"
        case ast.Call(func=ast.Name("Field"), args=[], keywords=given):
            return next((_plain(one.value) for one in given if one.arg == "default"), "needed")
        case ast.Call(func=ast.Name("Field"), args=[first, *_]):
            return _plain(first)
        case ast.Call():
            return "its own defaults"
        case value:
            return _plain(value)


def _plain(node: ast.expr) -> str:
    value = ast.literal_eval(node)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def commands_in(text: str) -> list[list[str]]:
    """Every `mlx-distill ...` of a page, in code blocks or in backquotes, as words, comments left out."""
    found = re.findall(r"(?:^\s*\$?\s*|`|-m )mlx[-_]distill ([^`\n]+?)(?=`|$)", text, flags=re.MULTILINE)
    lines = [shlex.split(line.split(" #")[0]) for line in found]
    return [words for words in lines if words and not words[0].isupper()]


def test_the_list_of_options_is_up_to_date() -> None:
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == options_page(), (
        "the options have changed; run: python tests/test_docs.py"
    )


def test_the_list_of_options_has_all_of_them() -> None:
    """Against the models themselves, so that no field is lost between the source and the page."""
    from mlx_distill import options, recipe

    page = options_page()
    for name, place in PLACES.items():
        section = page.split(f"## {place or 'The top level'}\n")[1].split("\n## ")[0]
        listed = re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)
        assert listed == list((recipe if name == "Recipe" else options).__dict__[name].model_fields)
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    assert all(len(row) == 6 for row in rows), "a `|` in a comment would break the table"


@each
def test_commands_exist_with_their_options(page: Path) -> None:
    from typer.main import get_command

    from mlx_distill.cli import app

    group = get_command(app)
    known = getattr(group, "commands")  # noqa: B009 - typer's own group, or click's, by version
    for words in commands_in(page.read_text(encoding="utf-8")):
        command = group if words[0].startswith("-") else known.get(words[0])
        assert command is not None, f"{page.name}: no command `mlx-distill {words[0]}`"
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        given = {word.split("=")[0] for word in words if word.startswith("-")}
        assert given <= options, f"{page.name}: `mlx-distill {' '.join(words)}`"


@each
def test_recipes_and_overrides_of_commands_exist(page: Path) -> None:
    from mlx_distill import bundled, recipe

    names = {name for name, _ in bundled.list_recipes()}
    last = {name.rpartition("/")[2] for name in names}
    for command, *words in commands_in(page.read_text(encoding="utf-8")):
        plain = [word for word in words if not word.startswith("-")]
        if command in ("report", "doctor", "watch", "chat", "compare") or not plain or plain[0].isupper():
            continue
        named = plain[0].removesuffix(".yaml").removeprefix("recipes/")
        assert named in names | last | {"my_model", "my_recipe"}, f"{page.name}: no recipe {plain[0]}"
        if named in names | last:
            found = next(name for name in names if named in (name, name.rpartition("/")[2]))
            recipe.load(ROOT / "recipes" / f"{found}.yaml", plain[1:])


@each
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@each
def test_tests_and_benchmarks_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, test in re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", text):
        assert f"def {test}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
    for file in re.findall(r"\bbenchmarks/(\w+\.py)", text):
        assert (ROOT / "benchmarks" / file).exists(), file


def test_every_loss_has_a_heading_and_its_options() -> None:
    from mlx_distill.losses.menu import MENU, SHARED

    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")[1:]}
    words = {True: "true", False: "false", None: "null", ...: "needed"}
    for loss, entry in MENU.items():
        for option, (_, default) in entry.own_options.items():
            named = default is ... or isinstance(default, bool | None)
            written = words[default] if named else str(default).replace("'", "").strip("`")
            line = f"| `{option}` | {written} |"
            assert line in sections[loss].replace(f"`{written}`", written), (loss, option)
    for shared in SHARED.values():  # those stand once, where the family begins
        assert all(f"| `{option}` |" in page for option in shared)


def test_every_metric_is_defined() -> None:
    from mlx_distill.metrics import COST, QUALITY

    pages = [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("evaluation", "speed")]
    for metric in (*QUALITY, *COST):
        name = re.sub("^(humaneval|mbpp)_", "", metric.name)  # of a published set, defined alike
        assert any(f"| `{name}`" in page for page in pages), metric.name


def test_what_the_path_of_a_batch_names_is_there() -> None:
    """Each `module.name` is a function or class of the package, or an option of a recipe."""
    from mlx_distill.recipe import Recipe

    page = (ROOT / "docs" / "path_of_a_batch.md").read_text(encoding="utf-8")
    names = re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", page)
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        if attribute in ("py", "json", "jsonl", "html") or name == "mlx_lm.load":
            continue
        section = Recipe.model_fields.get(module)
        if section is not None and attribute in getattr(_class_of(section), "model_fields", {}):
            continue
        assert callable(pkgutil.resolve_name(f"mlx_distill.{name}")), name


def _class_of(field: object) -> object:
    annotation = getattr(field, "annotation")  # noqa: B009
    return next((a for a in getattr(annotation, "__args__", ()) if a is not type(None)), annotation)


def test_messages_for_bad_rows_are_the_real_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_distill.data.rows import read_jsonl
    from mlx_distill.errors import DataError

    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    pairs = re.findall(r"^([{\[].*)\nerror: (.*)$", page, flags=re.MULTILINE)
    assert len(pairs) == 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for line, message in pairs:
        Path("data/train.jsonl").write_text(line + "\n", encoding="utf-8")
        with pytest.raises(DataError) as caught:
            read_jsonl("data/train.jsonl")
        assert str(caught.value) == message


def test_rows_shown_in_the_docs_can_be_read() -> None:
    from mlx_distill.data.rows import parse_row

    found = 0
    for page in DOCS:
        for block in re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.splitlines():
                parse_row(json.loads(line), page.name)
                found += 1
    assert found >= 3


def test_the_checks_find_the_usual_mistakes() -> None:
    """A command, an option and a name that are not there."""
    assert commands_in("    mlx-distill trian quickstart --fast  # now\n") == [
        ["trian", "quickstart", "--fast"]
    ]
    assert commands_in("say `mlx-distill run RECIPE` and `mlx-distill doctor`") == [
        ["run", "RECIPE"],
        ["doctor"],
    ]
    assert commands_in("what mlx-distill run does") == []


if __name__ == "__main__":
    (ROOT / "docs" / "recipe.md").write_text(options_page(), encoding="utf-8")
