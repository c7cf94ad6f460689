"""Objectives that a recipe, its models or its tokenizers do not allow: one line, code 2, nothing behind."""

import json
import shutil
from pathlib import Path

import pytest
import workshop
from tiny import SHAPE, tiny_recipe
from tiny_configs import tiny_config
from workshop import command, contents

from mlx_distill import layer_checks, models
from mlx_distill.errors import ModelError, RecipeError
from mlx_distill.layer_checks import check_objective
from mlx_distill.models import load_tokenizer
from mlx_distill.options import Shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workshop, and models of which there is no more than a config.json and a tokenizer."""
    root = workshop.make(tmp_path_factory.mktemp("workshop"))
    for name in ("gemma2", "deepseek_v3"):
        shutil.copytree(root / "teacher", root / name)
        config = {
            **json.loads((root / "teacher" / "config.json").read_text(encoding="utf-8")),
            **tiny_config(name),
        }
        (root / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    deep = Shape(**{**SHAPE, "num_hidden_layers": 4})
    models.save(root / "deep", models.build(deep, load_tokenizer(root / "teacher"), 4))
    return root


CACHE = "teacher={model: teacher, source: cache, top_k: 8}"
NEW = "student.tokenizer={pieces: 50, byte_fallback: false}"


def of(objective: str, *more: str) -> list[str]:
    return [f"objective={{{objective}}}", *more]


# Overrides of the workshop's recipe, and what the line says.
WRONG = {
    "unknown loss": (
        of("forward_kll: {}"),
        "unknown loss `objective.forward_kll`; did you mean `objective.forward_kl`?",
    ),
    "unknown option": (
        of("hidden_mse: {layer: last}"),
        "unknown option `objective.hidden_mse.layer`; did you mean `objective.hidden_mse.layers`?",
    ),
    "unknown option of exits": (
        of("cross_entropy: {}, exit_kl: {exits: [1], curiculum: gradual}"),
        "unknown option `objective.exit_kl.curiculum`; did you mean `objective.exit_kl.curriculum`?",
    ),
    "unknown layers": (
        of("hidden_mse: {layers: first}"),
        "`objective.hidden_mse.layers`: last, uniform, every",
    ),
    "missing exits": (of("cross_entropy: {}, exit_kl: {}"), "missing option `objective.exit_kl.exits`"),
    "no exits": (of("cross_entropy: {}, exit_kl: {exits: []}"), "`objective.exit_kl.exits`: "),
    "exit at the last layer": (
        of("cross_entropy: {}, exit_kl: {exits: [4]}", "student.shape.num_hidden_layers=4"),
        "`objective.exit_kl`: exits: layer 4 is no exit of 4 layers; give 1 to 3",
    ),
    "exit beyond the last layer": (
        of("cross_entropy: {}, exit_cross_entropy: {exits: [2, 9]}", "student.shape.num_hidden_layers=4"),
        "`objective.exit_cross_entropy`: exits: layer 9 is no exit of 4 layers",
    ),
    "exits out of order": (
        of("cross_entropy: {}, exit_kl: {exits: [3, 2]}", "student.shape.num_hidden_layers=4"),
        "exits: [3, 2] must go from low to high",
    ),
    "exit that would learn nothing": (
        of("cross_entropy: {}, exit_kl: {exits: [1]}"),
        "`objective.exit_kl`: exits: layer 1 would learn nothing",
    ),
    "layer beyond the student": (
        of("forward_kl: {}, hidden_mse: {layers: [[3, 1]]}"),
        "`objective.hidden_mse`: layers [3, 1]: the student's layers are 0 to 2 and the teacher's 0 to 2",
    ),
    "layer beyond the teacher": (
        of("forward_kl: {}, attention_transfer: {layers: [[1, 2], [2, 3]]}"),
        "`objective.attention_transfer`: layers [2, 3]: the student's layers are 1 to 2 and the teacher's 1",
    ),
    "layer beyond another teacher": (
        of(
            "forward_kl: {}, hidden_mse: {layers: [[2, 4]]}",
            "teacher={model: deep, others: [{model: teacher}]}",
        ),
        "`objective.hidden_mse`: layers [2, 4]: the student's layers are 0 to 2 and the teacher's 0 to 2",
    ),
    "attention has no embeddings": (
        of("forward_kl: {}, attention_transfer: {layers: [[0, 1]]}"),
        "layers [0, 1]: the student's layers are 1 to 2",
    ),
    "depths that do not fit": (
        of("forward_kl: {}, hidden_mse: {layers: all}", "teacher.model=deep"),
        "layers all: the student has 2 layers and the teacher 4 layers",
    ),
    "hidden attention": (
        of("forward_kl: {}, attention_transfer: {}", "teacher.model=gemma2"),
        "`objective.attention_transfer`: model type gemma2 does not show its attention (",
    ),
    "relation heads of the student": (
        of("forward_kl: {}, attention_relations: {heads: 64}"),
        "`objective.attention_relations`: 64 relation heads cannot share the width 32 in the student's",
    ),
    "relation heads of the teacher": (
        of("forward_kl: {}, attention_relations: {heads: 6}", "student.shape.head_dim=6"),
        "`objective.attention_relations`: 6 relation heads cannot share the width 64 in the teacher's",
    ),
    "relation heads of grouped keys": (
        of("forward_kl: {}, attention_relations: {heads: 32}", "student.shape.num_key_value_heads=1"),
        "`objective.attention_relations`: 32 relation heads cannot share the width 16 in the student's",
    ),
    "unlike vocabularies": (
        of("forward_kl: {}", "teacher.model=stranger", "student={model: student}"),
        "the student's tokenizer differs from the teacher's in ",
    ),
    "like vocabularies": (
        of("cross_entropy: {}, cross_tokenizer: {}"),
        "`objective.cross_tokenizer`: teacher and student have one vocabulary; use `forward_kl`",
    ),
    "forward_kl across vocabularies": (
        of("cross_tokenizer: {}, forward_kl: {}", "teacher.model=stranger", "student={model: student}"),
        "`objective.forward_kl` compares over one vocabulary, and no teacher has the student's",
    ),
    "hidden states across vocabularies": (
        of("cross_tokenizer: {}, hidden_mse: {}", NEW),
        "`objective.hidden_mse` compares over one vocabulary, and no teacher has the student's",
    ),
    "a tokenizer of the student's own": (of("forward_kl: {}", NEW), "add the loss `cross_tokenizer`"),
    "no teacher": (
        of("cross_tokenizer: {}", "teacher=null", NEW),
        "objective `cross_tokenizer` needs a `teacher`",
    ),
    "tail left out": (
        of("reverse_kl: {}", "teacher={model: teacher, top_k: 8, tail: false}"),
        "`teacher.tail` false makes `objective.reverse_kl` unsound: ",
    ),
    "tail of another teacher left out": (
        of("adaptive_kl: {}", "teacher.others=[{model: teacher, top_k: 8, tail: false}]"),
        "`teacher.others.0.tail` false makes `objective.adaptive_kl` unsound: ",
    ),
    "tail of nothing": (
        of("forward_kl: {}", "teacher.tail=false"),
        "`tail` is what `top_k` leaves over",
    ),
    "cache of everything": (of("forward_kl: {}", "teacher.source=cache"), "set `top_k`, such as 64"),
    "cache of attention": (
        of("forward_kl: {}, attention_transfer: {}", CACHE),
        "`teacher.source` cache stores no attention or text spans, which `objective.attention_transfer` nee",
    ),
    "cache of spans": (
        of("cross_tokenizer: {}", CACHE, NEW),
        "which `objective.cross_tokenizer` needs; use live",
    ),
    "two temperatures": (
        of("forward_kl: {temperature: 2.0}, reverse_kl: {}", "teacher.top_k=8"),
        "all losses share one temperature, at which the likeliest tokens and the rest are kept; got 1, 2",
    ),
    "balanced against nothing": (
        of("hidden_mse: {balanced: true}"),
        "`objective.hidden_mse.balanced` weighs against losses on logits, and there are none",
    ),
    "no share": (
        of("forward_kl: {}", "teacher.others=[{model: teacher, weight: 0}]"),
        "greater than 0; got 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_objective_is_one_line(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("weights were read"))
    overrides, message = WRONG[case]
    before = contents(folder)
    ended = command(folder, capsys, "run", "recipe.yaml", *overrides)
    assert (ended.code, len(ended.err)) == (2, 1), ended.err
    assert ended.err[0].startswith("error: ")
    assert message in ended.err[0]
    assert contents(folder) == before


def checked(folder: Path, objective: dict[str, object], **named: str) -> None:
    folders = {place: folder / name for place, name in named.items()}
    student = {"model": "x", "shape": None} if "student" in named else {}
    recipe = tiny_recipe(objective={"cross_entropy": {}, **objective}, student=student)
    check_objective(recipe, folders)


def test_what_is_right_passes(folder: Path) -> None:
    """The nearest neighbours of what is refused."""
    checked(folder, {"hidden_mse": {"layers": [[0, 0], [2, 4]]}}, teacher="deep")
    checked(folder, {"attention_transfer": {"layers": "every_other"}}, teacher="deep")
    checked(folder, {"attention_relations": {"heads": 16}}, teacher="teacher")
    checked(folder, {"attention_relations": {}}, teacher="teacher")
    checked(folder, {"exit_kl": {"exits": [2, 3]}}, teacher="teacher", student="deep")
    checked(folder, {"hidden_mse": {}}, teacher="gemma2")
    # What config.json does not tell is left for the model to tell.
    checked(folder, {"attention_relations": {"heads": 64}}, teacher="deepseek_v3", student="deepseek_v3")


def test_only_the_student_has_exits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher whose type allows none may still teach a student that has them."""

    def refuse(model_type: str, key: str) -> None:
        if model_type == "gemma2":
            raise ModelError(key)

    monkeypatch.setattr(layer_checks, "refuse_exits", refuse)
    checked(folder, {"exit_kl": {"exits": [2]}}, teacher="gemma2", student="deep")
    with pytest.raises(ModelError, match="objective.exit_kl"):
        checked(folder, {"exit_kl": {"exits": [2]}}, teacher="deep", student="gemma2")


def test_only_the_relations_compared_need_to_share(folder: Path) -> None:
    """Grouped keys are 16 wide; queries alone are 32."""
    grouped = Shape(**{**SHAPE, "num_key_value_heads": 1}).model_dump()
    (folder / "grouped").mkdir(exist_ok=True)
    (folder / "grouped" / "config.json").write_text(json.dumps(grouped), encoding="utf-8")
    heads = {"heads": 32, "relations": ["queries"]}
    checked(folder, {"attention_relations": heads}, teacher="grouped", student="grouped")
    with pytest.raises(RecipeError, match="width 16 in the student's"):
        checked(folder, {"attention_relations": {"heads": 32}}, teacher="grouped", student="grouped")
