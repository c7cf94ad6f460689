"""A recipe is read whole or refused with every mistake, overridden by key, and known by its fingerprint."""

from pathlib import Path
from typing import Any

import pytest

from mlx_distill.errors import NotFound, RecipeError
from mlx_distill.options import Source
from mlx_distill.recipe import decode, dump, fingerprint, load
from mlx_distill.strict_yaml import parse_yaml

TEXT = """
name: tiny
student:
  shape: {hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
teacher: {model: embedded}
data: {train: good.jsonl, test: {source: pocket, rows: 5}}
objective:
  forward_kl: {temperature: 2}
  cross_entropy:
train: {steps: 4, learning_rate: 1e-2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def mistakes(file: Path, *overrides: str) -> list[str]:
    """What `load` finds wrong, a line each, without the name of the file."""
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    return [line.removeprefix(f"{file}: ") for line in str(caught.value).splitlines()]


def test_a_recipe_is_read(file: Path) -> None:
    recipe = load(file)
    assert recipe.train.learning_rate == 0.01
    assert recipe.data.train == Source(source="good.jsonl")
    assert recipe.objective["forward_kl"].options == {"temperature": 2}
    assert (recipe.objective["cross_entropy"].weight, recipe.objective["cross_entropy"].options) == (1, {})
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 5  # type: ignore[misc]


def test_every_bundled_recipe_is_read(repository: Path) -> None:
    found = sorted((repository / "recipes").rglob("*.yaml"))
    assert found
    for path in found:
        recipe = load(path)
        assert decode(parse_yaml(dump(recipe), path)) == recipe


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["quantize={bits: 8}", "teacher.model=./some folder/ümlaut"],
        ["student={model: x, method: dora, rank: 4, dropout: 0.1, layers: 2}"],
        ["objective={cross_entropy: }", "teacher=null", "student.tokenizer.pieces=100"],
    ],
)
def test_what_is_dumped_is_loaded_again(file: Path, tmp_path: Path, overrides: list[str]) -> None:
    recipe = load(file, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe), encoding="utf-8")
    assert load(again) == recipe
    assert dump(load(again)) == dump(recipe)
    assert fingerprint(load(again)) == fingerprint(recipe)
    for option in (
        "batch_tokens: 4096",
        "rows: null",
        "tie_word_embeddings: true",
    ):  # defaults are written out
        if option != "tie_word_embeddings: true" or recipe.student.shape is not None:
            assert option in dump(recipe)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=50", "train.steps", 50),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.compile=false", "train.compile", False),
        ("train.clip=0", "train.clip", 0),
        ("name=other", "name", "other"),
        ("evaluate.tasks=[code, speed]", "evaluate.tasks", ["code", "speed"]),
        ("quantize.bits=8", "quantize.bits", 8),  # a section that was null
        ("quantize=null", "quantize", None),
        ("data.train=other.jsonl", "data.train.source", "other.jsonl"),
        ("data.train.rows=3", "data.train.rows", 3),  # below the shorthand for a source
        ("data.train.rows=3", "data.train.source", "good.jsonl"),
        ("data.test.start=7", "data.test.start", 7),
        ("data.test.start=7", "data.test.rows", 5),
        ("data.prompts.source=pocket", "data.prompts.source", "pocket"),
        ("student.shape.num_hidden_layers=3", "student.shape.num_hidden_layers", 3),
        ("teacher.model=a=b", "teacher.model", "a=b"),
    ],
)
def test_overrides(file: Path, override: str, path: str, value: Any) -> None:
    found: Any = load(file, [override])
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value


def test_overrides_of_the_objective(file: Path) -> None:
    terms = load(
        file, ["objective.cross_entropy.weight=0.1", "objective.forward_kl.temperature=3.5"]
    ).objective
    assert (terms["cross_entropy"].weight, terms["forward_kl"].options) == (0.1, {"temperature": 3.5})
    assert list(load(file, ["objective={forward_kl: {}}"]).objective) == ["forward_kl"]


def test_the_last_override_wins(file: Path) -> None:
    assert load(file, ["train.steps=5", "train.steps=6"]).train.steps == 6
    assert load(file, ["data.train=a.jsonl", "data.train.rows=2"]).data.train == Source(
        source="a.jsonl", rows=2
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=4", "unknown key `train.step`; did you mean `train.steps`?"),
        ("trian.steps=4", "unknown key `trian`; did you mean `train`?"),
        (
            "student.shape.hiden_size=4",
            "unknown key `student.shape.hiden_size`; did you mean `student.shape.hidde",
        ),
        ("data.train.row=4", "unknown key `data.train.row`; did you mean `data.train.rows`?"),
        ("quantize.zzz=4", "unknown key `quantize.zzz`; known here: bits, dtype, gib, group_size"),
        (
            "objective.forward_kll=",
            "unknown loss `objective.forward_kll`; did you mean `objective.forward_kl`?",
        ),
        (
            "objective.zzz=",
            "unknown loss `objective.zzz`; known here: adaptive_kl, attention_relations, attention_transfer, "
            "cross_entropy, cross_tokenizer, exit_cross_entropy, exit_kl, forward_kl, hidden_cosine, "
            "hidden_mse, jensen_shannon, policy_gradient, reverse_kl, skewed_forward_kl, skewed_reverse_kl, "
            "total_variation",
        ),
        (
            "objective.forward_kl.temprature=1",
            "unknown option `objective.forward_kl.temprature`; did you mean `objective.forward_kl.temper",
        ),
        (
            "objective.forward_kl.options={}",
            "unknown option `objective.forward_kl.options`; known here: temp",
        ),
        ("objective.forward_kl.temperature=hot", "`objective.forward_kl.temperature`: a number; got 'hot'"),
        ("objective.forward_kl.temperature=true", "`objective.forward_kl.temperature`: a number; got true"),
        (
            "objective.forward_kl.temperature=1e400",
            "`objective.forward_kl.temperature`: a finite number; got inf",
        ),
        ("objective.forward_kl.weight=0", "`objective.forward_kl.weight`: greater than 0; got 0"),
        ("objective.forward_kl=3", "`objective.forward_kl`: a mapping, such as {weight: 1.0}; got 3"),
        ("objective={}", "`objective`: a mapping from losses to their options"),
        ("train.steps=many", "`train.steps`: a whole number; got 'many'"),
        ("train.steps=4.0", "`train.steps`: a whole number; got 4.0"),
        ("train.steps=true", "`train.steps`: a whole number; got true"),
        ("train.steps=", "`train.steps`: a whole number; got null"),
        ("train.steps=0", "`train.steps`: greater than 0; got 0"),
        ("train.learning_rate='1e-4'", "`train.learning_rate`: a number; got '1e-4'"),
        ("train.learning_rate=1e400", "`train.learning_rate`: a finite number; got inf"),
        ("train.compile=no", "`train.compile`: true or false; got 'no'"),
        ("train.clip=-1", "`train.clip`: greater than or equal to 0; got -1"),
        ("train.warmup=4", "`train.warmup` 4 must be less than `train.steps` 4"),
        ("quantize=4", "`quantize`: a mapping; got 4"),
        ("quantize.bits=7", "`quantize.bits`: one of 2, 3, 4, 5, 6, 8; got 7"),
        ("quantize.bits='4'", "`quantize.bits`: one of 2, 3, 4, 5, 6, 8; got '4'"),
        ("evaluate.tasks=code", "`evaluate.tasks`: a list; got 'code'"),
        ("evaluate.tasks=[coode]", "`evaluate.tasks.0`: one of fidelity, code, summary, exact, choice, "),
        ("data.train=[1]", "`data.train`: a mapping; got [1]"),
        ("data.train={}", "missing key `data.train.source`"),
        ("data.train=null", "`data`: needs `train` (rows with answers), `prompts` (rows without), or both"),
        ("student=null", "`student`: a mapping; got null"),
        (
            "student.model=x",
            "`student`: needs one of `model` (load one), `shape` (build one) and `prune` (cut one out), "
            "not several",
        ),
        ("student.shape=null", "`student`: needs one of `model`"),
        ("student.method=lora", "`student`: method 'lora' adapts a loaded model; a new `shape` needs 'full'"),
        ("student.dropout=0.1", "`student`: `dropout` acts inside LoRA or DoRA matrices"),
        ("student.tokenizer.pieces=99", "`student.tokenizer`: with a teacher the student uses the teacher's"),
        ("student.shape.num_attention_heads=3", "`student.shape`: hidden_size 64 is no multiple of 3"),
        ("student.shape.num_key_value_heads=3", "`student.shape`: 2 attention heads are no multiple of 3"),
        ("student.shape.head_dim=3", "`student.shape`: the size of a head must be even"),
        ("name=../../etc", "`name`: letters, digits and . _ -, the first a letter or digit; got '../../etc'"),
        ("name=..", "`name`: letters, digits"),
        ("name=/tmp/x", "`name`: letters, digits"),
        ("name=.hidden", "`name`: letters, digits"),
        ('name="x\\n"', "`name`: letters, digits"),
        ("name=2024", "`name`: a string; got 2024"),
        ("seed=-1", "`seed`: greater than or equal to 0; got -1"),
    ],
)
def test_one_mistake_is_one_line(file: Path, override: str, message: str) -> None:
    found = mistakes(file, override)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_heads_of_a_llama_divide_its_width_whatever_their_size(file: Path) -> None:
    """transformers opens no other; a qwen3 may be so."""
    odd = ["student.shape.num_attention_heads=3", "student.shape.head_dim=32"]
    [found] = mistakes(file, *odd)
    assert found.startswith("`student.shape`: hidden_size 64 is no multiple of 3")
    assert load(file, [*odd, "student.shape.model_type=qwen3"]).student.shape is not None


def test_a_layer_that_is_computed_again_would_drop_other_inputs(file: Path) -> None:
    student = "student={model: x, method: lora, dropout: 0.1}"
    [found] = mistakes(file, student, "train.gradient_checkpointing=true")
    assert found.startswith("`train.gradient_checkpointing` would draw another mask of `student.dropout` 0.1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "override 'train.steps': write section.key=value, such as train.steps=50"),
        ("=3", "override '=3': write section.key=value"),
        ("train..steps=3", "override 'train..steps=3': write section.key=value"),
        ("train.steps=[1", "override 'train.steps=[1': line 1, column 3: not readable as YAML"),
        ("train.steps.x=1", "override 'train.steps.x=1': `train.steps` holds no keys of its own"),
        ("name.x=1", "override 'name.x=1': `name` holds no keys of its own"),
    ],
)
def test_an_override_that_cannot_be_applied(file: Path, override: str, message: str) -> None:
    assert mistakes(file, override)[0].startswith(message)


def test_all_mistakes_are_reported_at_once(file: Path) -> None:
    overrides = [
        "train.steps=many",
        "trian.x=1",
        "name=../x",
        "objective.forward_kl.temprature=1",
        "data.count=al",
    ]
    found = mistakes(file, *overrides, "objective.zzz=")
    assert [line.split(";")[0] for line in found] == [
        "`name`: letters, digits and . _ -, the first a letter or digit",
        "`data.count`: one of completion, all",
        "unknown option `objective.forward_kl.temprature`",
        "unknown loss `objective.zzz`",
        "`train.steps`: a whole number",
        "unknown key `trian`",
    ]
    assert mistakes(file, "teacher=null", "train.warmup=9") == [
        "objective `forward_kl` needs a `teacher`",
        "`student.shape` needs a `teacher`, for its tokenizer, or `student.tokenizer`",
        "`train.warmup` 9 must be less than `train.steps` 4",
    ]


def test_a_long_value_is_cut(file: Path) -> None:
    assert len(mistakes(file, "train.steps=" + "x" * 1000)[0]) < 150


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nosuch.yaml: no such recipe; `mlx-distill recipes` lists"):
        load(tmp_path / "nosuch.yaml")
    with pytest.raises(RecipeError, match="cannot be read as a recipe"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    with pytest.raises(RecipeError, match="latin.yaml: cannot be read as a recipe .*utf-8"):
        load(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "train.log_every=1",
        "train.eval_every=1",
        "train.save_every=1",
        "evaluate.tasks=[]",
        "evaluate.baseline=false",
        "quantize.bits=8",
        "data.test=other.jsonl",
        "data.valid=other.jsonl",
    ],
)
def test_the_fingerprint_leaves_alone_what_does_not_change_the_student(file: Path, override: str) -> None:
    assert fingerprint(load(file, [override])) == fingerprint(load(file))


def test_the_fingerprint_knows_each_change_of_the_student(file: Path) -> None:
    overrides = [
        "seed=1",
        "train.steps=5",
        "train.learning_rate=0.011",
        "train.compile=false",
        "objective.forward_kl.temperature=3",
        "objective.cross_entropy.weight=0.5",
        "student.shape.num_hidden_layers=3",
        "teacher.model=other",
        "data.train=other.jsonl",
        "data.max_tokens=99",
        "data.prompts={source: pocket, rows: 3}",
        "generate.max_tokens=9",
    ]
    found = {fingerprint(load(file, [override])) for override in overrides} | {fingerprint(load(file))}
    assert len(found) == len(overrides) + 1


def test_the_fingerprint_covers_what_stands_outside(file: Path) -> None:
    recipe = load(file)
    assert len({fingerprint(recipe), fingerprint(recipe, "data 1"), fingerprint(recipe, "data 2")}) == 3
